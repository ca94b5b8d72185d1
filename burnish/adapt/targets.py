"""Modules by name: `q_proj`, a pattern of names (`layers.1?.self_attn.*`), or a regular expression of whole names (`re:…`)."""

import re
from fnmatch import fnmatchcase

from burnish.errors import UserError, did_you_mean

ALL, ALL_LINEAR, REGEX = "all", "all-linear", "re:"


def matching(names: list[str], targets: tuple[str, ...], setting: str = "adapt.targets", what: str = "linear layer") -> list[str]:
    """Those of `names` that some target names, in their order. A target that names none of them is an error, said of the `setting`.

    A target is the end of a name (`q_proj`, `self_attn.q_proj`), with `*`, `?` and `[…]` as in file names; after `re:`, a regular
    expression of the whole name. `all` and `all-linear` are all of `names`.
    """
    kinds = sorted({name.rpartition(".")[2] for name in names})
    if not targets:
        raise UserError(f"{setting} is empty, so nothing would be trained. Name some of {', '.join(kinds)}, or {ALL_LINEAR}.")
    for target in targets:
        if target in (ALL, ALL_LINEAR) or any(matches(name, target) for name in names):
            continue
        if is_pattern(target):
            example = f" Their names are like {names[0]}." if names else ""
            raise UserError(f"{setting}: {target!r} matches no {what} of this model.{example}")
        owner = "this model's decoder" if what == "linear layer" else "this model"
        raise UserError(f"{setting}: {target!r} is no {what} of {owner}.{did_you_mean(target, [*kinds, ALL_LINEAR])}")
    return [name for name in names if any(target in (ALL, ALL_LINEAR) or matches(name, target) for target in targets)]


def matches(name: str, target: str) -> bool:
    """Whether a target that is not `all` or `all-linear` names the module."""
    if target.startswith(REGEX):
        try:
            return re.fullmatch(target.removeprefix(REGEX), name) is not None
        except re.error as problem:
            raise UserError(f"{target!r} is not a regular expression ({problem}). Correct it, or leave out {REGEX!r} for a name.") from None
    return fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")


def is_pattern(target: str) -> bool:
    """Whether it may name some layers and leave out others of the same kind."""
    return target.startswith(REGEX) or any(sign in target for sign in "*?[.")
