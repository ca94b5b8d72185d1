"""`burnish plan`'s words → a config: of a file, of flags alone, or of flags put over a file."""

import json
from pathlib import Path

from burnish.config import RunConfig
from burnish.errors import UserError
from burnish.plan.shapes import hub_id
from burnish.toml import load_config, parse_config

FLAGS = {
    "model": "model.path",
    "format": "model.format",
    "method": "adapt.method",
    "rank": "adapt.rank",
    "context": "data.context",
    "batch": "train.rows_per_step",
}
"""A flag → the setting that it is short for."""


def asked_config(config: Path | None, overrides: tuple[str, ...], flags: dict[str, str | int | None]) -> RunConfig:
    """The config to plan: `flags` (of FLAGS; None is not given) are put over the file or, where there is none, over the defaults.

    Raises a `UserError` where neither says which model.
    """
    if config is not None and "=" in str(config) and not config.exists():  # no file was given, so the first override stands in its place
        config, overrides = None, (str(config), *overrides)
    given = {FLAGS[name]: value for name, value in flags.items() if value is not None}
    if isinstance(model := given.get("model.path"), str):
        given["model.path"] = str(Path(model).expanduser().resolve()) if Path(model).expanduser().exists() else hub_id(model)
    words = (*(f"{key}={json.dumps(value)}" for key, value in given.items()), *overrides)
    if config is not None:
        return load_config(config, words)
    if not any(word.startswith("model.path=") for word in words):
        raise UserError("burnish plan: of which model? Give a config file, or --model llama-3-70b.")
    return parse_config({"name": "plan"}, "burnish plan", words)
