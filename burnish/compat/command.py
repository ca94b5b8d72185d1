"""The words of a command line → the TOML that is shown and the config that is run; and what `--help` lists."""

import textwrap

from burnish.compat.arguments import ARGUMENTS, parse
from burnish.compat.choices import DATASETS
from burnish.compat.mapping import FATES, Becomes, NoEffect, Refused, With
from burnish.compat.translate import as_toml, checked, translate
from burnish.config import RunConfig


def translated(words: list[str]) -> tuple[str, RunConfig]:
    """(the config as TOML, the same checked) of the words after `train.py`, for this machine's GPUs.

    Raises a `UserError` for every word that is not understood, and for what no setting of burnish can be.
    """
    from burnish.parallel.world import launched_ranks
    from burnish.plan.machine import this_machine

    given = parse(words)
    machine = this_machine()
    translation = translate(given, max(machine.devices, launched_ranks()), machine.device != "cpu")
    return as_toml(translation), checked(translation)


def listing() -> str:
    """Every argument with its default, its choices and what becomes of it."""
    lines = ["train.py takes fsdp_qlora's arguments, --name value or --name=value:"]
    for name, argument in ARGUMENTS.items():
        choices = (*DATASETS, "PATH") if name == "dataset" else argument.choices
        takes = " | ".join(choices) if choices else argument.kind.__name__
        lines.append(f"  --{name} {takes}  (default: {argument.default})")
        lines += textwrap.wrap(fate_in_words(name), 110, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines) + "\n"


def fate_in_words(name: str) -> str:
    """What becomes of an argument, for a reader."""
    fate = FATES[name]
    if isinstance(fate, Becomes):
        return "becomes " + ", ".join(fate.names)
    if isinstance(fate, With):
        return f"is translated together with --{fate.argument}"
    if isinstance(fate, NoEffect):
        return f"has no effect: {fate.why}"
    assert isinstance(fate, Refused)
    return f"is refused unless it is {' or '.join([ARGUMENTS[name].default, *fate.unless])}: {fate.why}"
