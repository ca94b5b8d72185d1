"""A command line of the original → plain values of a config, as TOML with what differs above it → a checked `RunConfig`."""

import json
import re
import textwrap
from dataclasses import dataclass, fields
from typing import Any

from burnish.compat.arguments import ARGUMENTS, Given
from burnish.compat.choices import Settings
from burnish.compat.differs import differences, without_effect
from burnish.compat.mapping import FATES, Asked, Becomes, Refused, With
from burnish.config import RunConfig
from burnish.errors import UserError
from burnish.toml import parse_config
from burnish.words import counted

WIDTH = 110


@dataclass(frozen=True)
class Translation:
    """Settings by their dotted names, the arguments that each came from, and what the user is to know."""

    settings: Settings
    origin: dict[str, str]
    differs: list[str]
    ignored: list[str]


def translate(given: Given, gpus: int, on_gpu: bool = True) -> Translation:
    """The settings that a command line stands for on `gpus` GPUs (1 on a CPU), where `--world_size` does not say.

    Raises one `UserError` with every argument that is refused.
    """
    asked = Asked(given.values, gpus if given.values.world_size == -1 else given.values.world_size, on_gpu)
    settings: Settings = {}
    origin: dict[str, str] = {}
    problems = _problems(asked)
    for name, fate in FATES.items():
        try:
            became = fate.settings(asked) if isinstance(fate, Becomes) else {}
        except UserError as problem:
            problems.append(str(problem))
            continue
        said = " ".join(_said(argument, given) for argument in (name, *_with(name)))
        origin |= dict.fromkeys(became, said)
        settings |= became
    if problems:
        raise UserError("\n  ".join([f"{counted(len(problems), 'problem')} with the arguments", *problems]))
    return Translation(settings, origin, differences(asked), without_effect(given))


def _problems(asked: Asked) -> list[str]:
    problems = []
    for name, fate in FATES.items():
        value = getattr(asked.v, name)
        if isinstance(fate, Refused) and value not in (ARGUMENTS[name].default, *fate.unless):
            problems.append(f"--{name} {value}: {fate.why}")
    if asked.v.n_bits != 4 and asked.kind.format != "hqq":
        problems.append(f"--n_bits {asked.v.n_bits}: only the hqq train types have other widths than 4, not {asked.v.train_type}")
    if asked.gpus < 1:
        problems.append(f"--world_size {asked.v.world_size}: a number of GPUs is expected, or -1 for all")
    return problems


def _with(name: str) -> list[str]:
    return [other for other, fate in FATES.items() if isinstance(fate, With) and fate.argument == name]


def _said(name: str, given: Given) -> str:
    value = getattr(given.values, name)
    return f"--{name} {str(value).lower() if isinstance(value, bool) else value}"


def nested(settings: Settings) -> dict[str, Any]:
    """Sections of plain values, as `parse_config` takes them, in the config's order."""
    order = [entry.name for entry in fields(RunConfig)]
    raw: dict[str, Any] = {}
    for dotted, value in settings.items():
        section, _, key = dotted.rpartition(".")
        (raw.setdefault(section, {}) if section else raw)[key] = value
    return dict(sorted(raw.items(), key=lambda item: order.index(item[0])))


def checked(translation: Translation) -> RunConfig:
    """The `RunConfig`. A setting that burnish refuses is told with the argument that it stands for."""
    try:
        return parse_config(nested(translation.settings), "what the arguments stand for")
    except UserError as problem:
        first, *lines = str(problem).splitlines()
        raise UserError("\n".join([first, *(_with_origin(line, translation.origin) for line in lines)])) from None


def _with_origin(line: str, origin: dict[str, str]) -> str:
    setting = re.sub(r"(\.\d+)*( = .*|: .*)", "", line.strip())  # the item of a list, and what is said of it
    return f"{line} It stands for {origin[setting]}." if setting in origin else line


def as_toml(translation: Translation) -> str:
    """The config as a file to keep: what differs and what has no effect as comments, then the settings."""
    lines = ["# fsdp_qlora's arguments as a burnish config. Kept in a file, it is run by: burnish run FILE.toml"]
    notes = [*translation.differs, *translation.ignored]
    if notes:
        lines.append("# What is not as it was (docs/from_fsdp_qlora.md has the reasons):")
    for note in notes:
        lines += textwrap.wrap(note, WIDTH, initial_indent="# * ", subsequent_indent="#   ", break_on_hyphens=False)
    raw = nested(translation.settings)
    lines += ["", *(f"{key} = {_toml(value)}" for key, value in raw.items() if not isinstance(value, dict))]
    for section, values in raw.items():
        if isinstance(values, dict):
            lines += ["", f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """JSON's text of strings, numbers, booleans and lists of strings is TOML's too."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
