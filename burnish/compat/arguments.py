"""The arguments of fsdp_qlora's train.py: their names, kinds, choices and defaults, and how its command lines are read."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from burnish.compat.choices import LOGS, OPTIMIZERS, PRECISIONS, STRATEGIES, TARGETS, TRAIN_TYPES, WARMUP
from burnish.errors import UserError, did_you_mean
from burnish.words import counted

TRUE, FALSE = ("true", "t", "yes", "y", "on", "1"), ("false", "f", "no", "n", "off", "0")


@dataclass(frozen=True)
class Argument:
    """What one argument takes."""

    kind: type
    default: Any
    choices: tuple[str, ...] = ()


def _flag(default: bool) -> Argument:
    return Argument(bool, default)


ARGUMENTS: dict[str, Argument] = {
    "world_size": Argument(int, -1),
    "train_type": Argument(str, "qlora", tuple(TRAIN_TYPES)),
    "llama_pro_path": Argument(str, None),
    "batch_size": Argument(int, 1),
    "context_length": Argument(int, 512),
    "gradient_accumulation_steps": Argument(int, 1),
    "num_epochs": Argument(int, 1),
    "dataset": Argument(str, "alpaca_sample"),  # its choices are `choices.DATASETS`; a path too
    "dataset_samples": Argument(int, 512),
    "sharding_strategy": Argument(str, "full_shard", tuple(STRATEGIES)),
    "use_gradient_checkpointing": _flag(True),
    "reentrant_checkpointing": _flag(False),
    "use_cpu_offload": _flag(True),
    "use_activation_cpu_offload": _flag(False),
    "low_memory": _flag(True),
    "no_sync": _flag(False),
    "precision": Argument(str, "bf16", tuple(PRECISIONS)),
    "model_name": Argument(str, "meta-llama/Llama-2-7b-hf"),
    "save_model": _flag(False),
    "output_dir": Argument(str, "output"),
    "lora_rank": Argument(int, 64),
    "lora_alpha": Argument(int, 16),
    "lora_dropout": Argument(float, 0.1),
    "lora_target_modules": Argument(str, "all", tuple(TARGETS)),
    "verbose": _flag(False),
    "lr": Argument(float, 1e-5),
    "apply_gradient_clipping": _flag(False),
    "grad_norm": Argument(float, 0.3),
    "wd": Argument(float, 0.1),
    "profile_memory": _flag(False),
    "optimizer": Argument(str, "adamw", tuple(OPTIMIZERS)),
    "lr_scheduler": Argument(str, "constant", tuple(WARMUP)),
    "loading_workers": Argument(int, -1),
    "log_to": Argument(str, "tqdm", tuple(LOGS)),
    "master_addr": Argument(str, "localhost"),
    "master_port": Argument(str, "12355"),
    "seed": Argument(int, 42),
    "project_name": Argument(str, "fsdp_qlora"),
    "name": Argument(str, None),
    "group": Argument(str, None),
    "entity": Argument(str, None),
    "n_bits": Argument(int, 4),
    "profile": _flag(False),
    "profiling_output": Argument(str, "profiles"),
    "with_stack": _flag(False),
    "with_shapes": _flag(False),
    "export_trace": _flag(True),
    "export_memory_timeline": _flag(False),
    "wait_steps": Argument(int, 0),
    "warmup_steps": Argument(int, 1),
    "active_steps": Argument(int, 2),
    "repeat": Argument(int, 0),
    "profiling_frequency": Argument(int, 10),
    "max_steps": Argument(int, -1),
}
"""All of them, in the original's order."""


@dataclass(frozen=True)
class Given:
    """A command line as it was read: every argument's value, and which of them stood on it."""

    values: SimpleNamespace
    given: frozenset[str]


def parse(words: Iterable[str], arguments: dict[str, Argument] | None = None) -> Given:
    """Reads `--name value`, `--name=value` and a bare `--name` for true, as the original did: hyphens for underscores and any
    beginning of a name that fits one alone. The last of several wins.

    Raises one `UserError` that lists every problem of the line.
    """
    arguments = ARGUMENTS if arguments is None else arguments
    values = {name: argument.default for name, argument in arguments.items()}
    given: set[str] = set()
    problems: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        try:
            name, text = _named(word, arguments)
            if text is None and rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            values[name] = _value(name, text, arguments[name])
            given.add(name)
        except UserError as problem:
            problems.append(str(problem))
            while rest and not rest[0].startswith("--"):  # the value of what was not understood
                rest.pop(0)
    if problems:
        raise UserError("\n  ".join([f"{counted(len(problems), 'problem')} with the arguments", *problems]))
    return Given(SimpleNamespace(**values), frozenset(given))


def _named(word: str, arguments: dict[str, Argument]) -> tuple[str, str | None]:
    """(an argument's name, what follows its equals sign)."""
    if word.strip() in ("", "#"):
        raise UserError(
            f"{word!r}: in a shell, the backslash that continues a line must be its last character, with no space or comment behind it"
        )
    if not word.startswith("--"):
        raise UserError(f"{word!r}: belongs to no argument. Each begins with two hyphens: --batch_size 2")
    written, equals, text = word[2:].partition("=")
    asked = written.replace("-", "_")
    fitting = [name for name in arguments if name.startswith(asked)] if asked else []
    if asked in arguments:
        fitting = [asked]
    if not fitting:
        raise UserError(f"--{written}: no such argument.{did_you_mean(asked, list(arguments))}")
    if len(fitting) > 1:
        raise UserError(f"--{written}: may mean {', '.join(f'--{name}' for name in fitting)}. Write it out.")
    return fitting[0], text if equals else None


def _value(name: str, text: str | None, argument: Argument) -> Any:
    """The text of an argument as its kind."""
    if text is None:
        if argument.kind is bool:
            return True
        raise UserError(f"--{name}: its value is missing ({EXPECTED[argument.kind]})")
    try:
        value = READ[argument.kind](text)
    except ValueError:
        raise UserError(f"--{name} {text}: {EXPECTED[argument.kind]} is expected") from None
    if argument.choices and value not in argument.choices:
        raise UserError(f"--{name} {text}: no such choice.{did_you_mean(text, list(argument.choices))}")
    return value


def _boolean(text: str) -> bool:
    word = text.lower()
    if word not in TRUE + FALSE:
        raise ValueError(text)
    return word in TRUE


READ: dict[type, Callable[[str], Any]] = {bool: _boolean, int: int, float: float, str: str}
EXPECTED: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
