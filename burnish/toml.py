"""One strict TOML file, with overrides put over it → a checked `RunConfig`, or all its problems in one message."""

import json
import tomllib
from dataclasses import asdict, fields
from datetime import date, time
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from burnish.config import RunConfig
from burnish.errors import UserError, did_you_mean
from burnish.words import counted


def load_config(path: str | Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """The run described by a TOML file, with `section.key=value` overrides put over it.

    Paths inside it that are relative and exist beside the file are resolved against the file's folder.
    Raises a `UserError` that lists every problem at once.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. A first one to copy is examples/ferry/demo.toml.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; a config is one TOML file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise UserError(f"{path} is not valid TOML: {problem}.") from None
    for override in overrides:
        _override(raw, override)
    return _resolved(parse_config(raw, path.name), path.parent)


def parse_config(raw: dict[str, Any], name: str = "config", overrides: tuple[str, ...] = ()) -> RunConfig:
    """A checked `RunConfig` from plain values, with overrides put over them; `name` is what error messages call their source."""
    for override in overrides:
        _override(raw, override)
    try:
        return TypeAdapter(RunConfig).validate_python(raw)
    except ValidationError as problems:
        lines = list(dict.fromkeys(_explain(problem) for problem in _each_once([dict(problem) for problem in problems.errors()])))
        raise UserError(f"{name}: {counted(len(lines), 'problem')}\n  " + "\n  ".join(lines)) from None


def _override(raw: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"{override!r} is not an override. Write section.key=value, for example train.lr=1e-4.")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = _bare(text)
    if isinstance(value, (date, time)):
        value = text.strip()  # name=2026-01-31: no setting is a date
    place = raw
    for key in keys[:-1]:
        place = place.setdefault(key, {})
        if not isinstance(place, dict):
            raise UserError(f"{dotted}: {key} is a setting, not a section.")
    place[keys[-1]] = value


def _bare(text: str) -> str | list[str]:
    """Words without quotes are strings, `[a, b]` a list of them, so that no shell needs two kinds of quotes."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return text
    return [word.strip().strip("'\"") for word in text[1:-1].split(",") if word.strip()]


def _keys(problem: dict[str, Any]) -> list[str]:
    # pydantic puts the alternatives of a union among the keys ("tuple[str, ...]"); a setting's name is an identifier, an item's a number
    return [str(key) for key in problem["loc"] if str(key).isidentifier() or isinstance(key, int)]


def _each_once(problems: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One problem for a setting that may be a list or a number, and is neither: that with the list, which then has `or_number`, and
    `out_of_range` for a number that is too small or too large."""
    lists = {tuple(_keys(problem)): problem for problem in problems if problem["type"] == "tuple_type"}
    others = [problem for problem in problems if problem["type"] != "tuple_type"]
    for problem in others:
        if (same := lists.get(tuple(_keys(problem)))) is not None:
            same["or_number"] = True
            if problem["type"] in ("greater_than_equal", "less_than"):
                same["out_of_range"] = f"{problem['msg'][0].lower()}{problem['msg'][1:]}"
    return [*lists.values(), *(problem for problem in others if tuple(_keys(problem)) not in lists)]


def _explain(problem: dict[str, Any]) -> str:
    keys = _keys(problem)
    where = ".".join(keys)
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        owner = _section([key for key in keys[:-1] if not key.isdigit()])
        elsewhere = [f"{entry.name}.{keys[-1]}" for entry in fields(RunConfig) if keys[-1] in _section([entry.name])]
        return f"{where}: no such setting.{f' Did you mean {elsewhere[0]}?' if elsewhere else did_you_mean(keys[-1], owner)}"
    if problem["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{where}: is missing."
    if problem["type"] == "value_error" and len(keys) == 1:  # settings of a section that do not go together
        return f"{where}.{problem['ctx']['error']}"
    if problem["type"] == "dataclass_type" and len(keys) == 1:
        return f"{where} = {problem['input']!r}: {where} is a section. Its settings stand under [{where}]."
    if problem.get("out_of_range"):
        return f"{where} = {problem['input']!r}: {problem['out_of_range']}."
    if problem["type"] == "tuple_type":
        value = problem["input"] if isinstance(problem["input"], (int, float)) else str(problem["input"])
        number = ", or a number" if problem.get("or_number") else ""
        return f"{where} = {problem['input']!r}: a list is expected, such as [{json.dumps(value, ensure_ascii=False)}]{number}."
    return f"{where} = {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}."


def _section(keys: list[str]) -> list[str]:
    owner: Any = RunConfig
    for key in keys:
        found = [entry.type for entry in fields(owner) if entry.name == key]
        inner = [kind for entry in found for kind in (entry, *getattr(entry, "__args__", ())) if hasattr(kind, "__dataclass_fields__")]
        if not inner:
            return []
        owner = inner[0]
    return [entry.name for entry in fields(owner)]


def _resolved(config: RunConfig, folder: Path) -> RunConfig:
    """Paths beside the config file, made absolute; what does not exist there is left to its reader to explain."""

    def beside(text: str) -> str:
        path = Path(text).expanduser()
        return str(path if path.is_absolute() else (folder / path).resolve())

    def model(text: str) -> str:
        return beside(text) if (folder / text).exists() else text

    def source(text: str) -> str:
        """A set's name, `name=path`, or a file: only a path has a point or a slash in it."""
        name, equals, path = text.partition("=")
        if equals and name.isidentifier():
            return f"{name}={beside(path)}"
        return text if text.isidentifier() and not (folder / text).exists() else beside(text)

    values = asdict(config)
    values["model"]["path"] = model(config.model.path)
    for key in ("documents", "rows", "questions"):
        values["data"][key] = tuple(beside(text) for text in values["data"][key])
    for section, key in (("data", "sets"), ("data", "replay"), ("evaluate", "general")):
        values[section][key] = tuple(source(text) for text in values[section][key])
    for part in values["data"]["mixture"]:
        part["source"] = source(part["source"])
    if isinstance(config.data.validation, tuple):
        values["data"]["validation"] = tuple(beside(text) for text in config.data.validation)
    return TypeAdapter(RunConfig).validate_python(values)
