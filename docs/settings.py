"""Writes docs/settings.md from burnish/config.py: `python docs/settings.py` (`--check` exits with 1 where the page is stale)."""

import sys
from dataclasses import MISSING, fields
from pathlib import Path

from burnish.config import RunConfig

PAGE = Path(__file__).with_name("settings.md")
HEAD = (
    "# Settings\n\nOne TOML file describes a run. Sections and settings are those of `burnish/config.py`, which this page is made from.\n"
)


def page() -> str:
    """The page, made from the sections' fields, types, defaults and docstrings."""
    parts = [HEAD, "\n## Top level\n\n" + _table(RunConfig, skip_sections=True)]
    for entry in fields(RunConfig):
        if hasattr(entry.type, "__dataclass_fields__"):
            parts.append(f"\n## [{entry.name}]\n\n{entry.type.__doc__}\n\n{_table(entry.type)}")
    return "".join(parts)


def _table(section: type, skip_sections: bool = False) -> str:
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    described = section.__pydantic_fields__
    for entry in fields(section):
        if skip_sections and hasattr(entry.type, "__dataclass_fields__"):
            continue
        default = "required" if entry.default is MISSING else f"`{_toml(entry.default)}`"
        meaning = " ".join((described[entry.name].description or "").split())  # a line break would end the row
        lines.append(f"| `{entry.name}` | {default} | {_choices(entry.type)}{meaning} |")
    return "\n".join(lines) + "\n"


def _choices(kind: object) -> str:
    values = getattr(kind, "__args__", ())
    return "one of " + ", ".join(f"`{value}`" for value in values) + ". " if "Literal" in str(kind)[:15] and values else ""


def _toml(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(f'"{item}"' for item in value) + "]"
    return f'"{value}"' if isinstance(value, str) else f"{value}"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(
            0 if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page() else "docs/settings.md is stale: python docs/settings.py"
        )
    PAGE.write_text(page(), encoding="utf-8")
