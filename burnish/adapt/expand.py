"""Block expansion (Llama Pro, arXiv 2401.02415): new decoder blocks among the base's, which stay as they are.

A new block starts as a copy of the block before it with the two matrices that write into the residual stream at zero, so that it adds
nothing: the expanded model equals its base.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from burnish.errors import UserError

SILENCED = ("o_proj", "down_proj")
"""The matrices of a block that write into the residual stream: zero in a new one."""


@dataclass(frozen=True)
class Growth:
    """Where the blocks of an expanded model come from."""

    sources: tuple[int, ...]
    """For each block, the base's block that it is; for a new one, that it starts as a copy of."""
    new: tuple[int, ...]
    """The positions of the new blocks."""

    def origin(self, prefix: str, name: str) -> tuple[str, bool, bool]:
        """Of tensor `name` of the expanded model, whose blocks are `PREFIX.0` and so on: the base's tensor that it is filled from, whether
        it is a new block's (the base's own block has that tensor too), and whether it starts at zero instead."""
        found = re.fullmatch(rf"{re.escape(prefix)}\.(\d+)\.(.+)", name)
        if found is None:
            return name, False, False
        block, rest = int(found.group(1)), found.group(2)
        new = block in self.new
        return f"{prefix}.{self.sources[block]}.{rest}", new, new and rest.split(".")[-2] in SILENCED


def growth(depth: int, new_blocks: int, setting: str = "adapt.new_blocks") -> Growth:
    """`new_blocks` new blocks among `depth`, spread evenly. A `UserError`, said of the `setting`, for fewer than 1 or more than `depth`."""
    if not 1 <= new_blocks <= depth:
        raise UserError(
            f"{setting} = {new_blocks}: block expansion adds at least one block, and at most one behind each of the model's {depth}. "
            f"Set {setting} to a number from 1 to {depth}."
        )
    behind = places_behind(depth, new_blocks)
    sources, new = [], []
    for block in range(depth):
        sources.append(block)
        if block in behind:
            new.append(len(sources))
            sources.append(block)
    return Growth(tuple(sources), tuple(new))


def places_behind(depth: int, new_blocks: int) -> tuple[int, ...]:
    """The base's blocks that get a new one behind them, spread evenly over the depth.

    Where groups of depth // new_blocks blocks give just so many, the places are those of Llama Pro's own script, which leaves the
    remainder at the end (32 blocks and 3 new ones: behind 10, 20, 30); elsewhere that script would give more blocks than were asked for.
    """
    group, rest = divmod(depth, new_blocks)
    if rest < group:
        return tuple(group * number - 1 for number in range(1, new_blocks + 1))
    return tuple(depth * number // new_blocks - 1 for number in range(1, new_blocks + 1))


def with_blocks(config: PretrainedConfig, sources: Sequence[int]) -> PretrainedConfig:
    """The configuration of a model whose blocks are those of `sources`, in that order: its depth, and every list with an entry for each
    block (`layer_types` …)."""
    changed = copy.deepcopy(config)
    depth = config.num_hidden_layers
    for name, value in list(vars(changed).items()):
        if "layer" in name and isinstance(value, (list, tuple)) and len(value) == depth:
            setattr(changed, name, [value[block] for block in sources])
    changed.num_hidden_layers = len(sources)
    return changed


def check_silenced(new: Sequence[str], modules: Sequence[str]) -> None:
    """Each new block must have the matrices that are set to zero, under the names that are known here."""
    for block in new:
        lost = [name for name in SILENCED if not any(module.startswith(f"{block}.") and module.endswith(f".{name}") for module in modules)]
        if lost:
            raise UserError(
                f"a block of this model has no {' and no '.join(lost)}, which block expansion sets to zero in a new one: not supported. "
                "Choose adapt.method=dora."
            )
