"""Bytes last: one pass over the model's tensors, read → quantize → this rank's rows → their place.

Every tensor on disk is placed exactly once and every place is filled exactly once, or the run stops and names it. At most a slab of
`SLAB_BYTES` of dense rows exists at a time, so no rank ever holds a dense matrix that is larger.
"""

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from burnish.errors import UserError
from burnish.load.cache import Cache, Writing
from burnish.load.weights import TensorInfo, Weights
from burnish.parallel.rows import local_rows, row_range
from burnish.parallel.world import any_rank

SLAB_BYTES = 64 << 20
log = logging.getLogger("burnish")

HEAD = "lm_head.weight"
IGNORED = {
    r".*rotary_emb\.inv_freq": "computed from the config; older files carry it",
    r".*\.attention\.(masked_)?bias": "a causal mask kept as a tensor; older files carry it",
    r"lm_head\.weight": "tied to the embeddings by the config",
}
"""What a file may hold that the model has no place for, and why. Anything else stops the run."""


@dataclass(frozen=True)
class Place:
    """Where a tensor of the file goes: a parameter as it is, or a layer that encodes its dense weight into several."""

    module: nn.Module
    attribute: str
    """Name of the parameter; `weight` for a layer that encodes."""
    shape: tuple[int, ...]
    encodes: bool = False

    def parameters(self) -> dict[str, Tensor]:
        """The parameters that are filled from it, as they are now (sharding replaces them)."""
        if not self.encodes:
            return {self.attribute: getattr(self.module, self.attribute)}
        return {name: parameter for name, parameter in self.module.named_parameters(recurse=False) if name != "bias"}

    def rows(self) -> tuple[int, int]:
        return row_range(next(iter(self.parameters().values())))

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        return self.module.encode(rows) if self.encodes else {self.attribute: rows}  # pyright: ignore[reportCallIssue]

    def adopts(self, info: TensorInfo) -> bool:
        """Whether the file's bytes are this place's as they are: quantized already, in the layer's own format."""
        stored = info.stored
        return self.encodes and stored is not None and self.module.adopts(stored.format, stored.block)  # pyright: ignore[reportCallIssue]

    def adopt(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.module.adopt(stored)  # pyright: ignore[reportCallIssue]


def places_of(model: nn.Module) -> dict[str, Place]:
    """The place of each tensor by its name on disk. Taken before adapters wrap layers and change names; a tied parameter has one place."""
    places: dict[str, Place] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        encodes = hasattr(module, "encode")
        if encodes:
            places[f"{prefix}.weight"] = Place(module, "weight", (module.out_features, module.in_features), encodes=True)  # pyright: ignore
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen and (not encodes or name == "bias"):
                seen.add(id(parameter))
                places[f"{prefix}.{name}"] = Place(module, name, tuple(parameter.shape))
    return places


def fill(
    places: dict[str, Place], weights: Weights, cache: Cache | None, device: torch.device, advance: Callable[[int], None] = lambda _: None
) -> None:
    """Fills every place, from the quantized cache where it has this model, and into it where it has not.

    `advance` is told the bytes read.
    """
    check(places, weights)
    parameters = {entry(name, place, part): parameter for name, place in places.items() for part, parameter in place.parameters().items()}
    if cache is not None and not any_rank(not cache.holds(parameters), device):  # all ranks or none: a cache may lie on one machine's disk
        for name, parameter in parameters.items():
            local_rows(parameter).copy_(cache.read(name, *row_range(parameter)))
        advance(sum(weights.infos[name].bytes for name in places))
        return
    check_tied(places, weights)
    writing = cache.start(parameters, device) if cache else None
    try:
        _from_weights(places, weights, writing, device, advance)
        if writing:
            writing.finish(device)
    finally:
        if writing:
            writing.close()


def _from_weights(
    places: dict[str, Place], weights: Weights, writing: Writing | None, device: torch.device, advance: Callable[[int], None]
) -> None:
    for name, place in places.items():
        first, last = place.rows()
        for start, stop in slabs(first, last, place.shape):
            with torch.no_grad():
                encoded = _rows(name, place, weights, start, stop, device)
                for part, parameter in place.parameters().items():
                    mine = local_rows(parameter)[start - first : stop - first]
                    mine.copy_(encoded[part])
                    if writing:
                        writing.rows(entry(name, place, part), start, mine)
        advance(weights.infos[name].bytes * (last - first) // max(1, place.shape[0]))


def _rows(name: str, place: Place, weights: Weights, start: int, stop: int, device: torch.device) -> dict[str, Tensor]:
    """What goes into the place's parameters for some rows: the file's own bytes where it holds them in the layer's format."""
    if place.adopts(weights.infos[name]):
        return place.adopt({part: tensor.to(device) for part, tensor in weights.stored_rows(name, start, stop).items()})
    return place.encode(weights.rows(name, start, stop).to(device))


def quantizes(places: dict[str, Place], weights: Weights) -> bool:
    """Whether filling costs a quantization, which a cache would save: not where the file holds all as the layers do."""
    infos = weights.infos  # a tensor that is missing is named by `check`
    dense = [place.module for name, place in places.items() if place.encodes and not (name in infos and place.adopts(infos[name]))]
    return any(module.format_name != "none" for module in dense)


def check_tied(places: dict[str, Place], weights: Weights) -> None:
    """Where the config ties the head to the embeddings and the file holds a head all the same, it must be the same: told by a few rows.

    transformers only warns and leaves such a model untied, so that ours would answer otherwise.
    """
    embedding = next((name for name, place in places.items() if isinstance(place.module, nn.Embedding)), None)
    if embedding is None or HEAD in places or HEAD not in weights.infos:
        return
    count = places[embedding].shape[0]
    for row in range(0, count, max(1, count // 16)):
        if not torch.equal(weights.rows(HEAD, row, row + 1).float(), weights.rows(embedding, row, row + 1).float()):
            raise UserError(
                f"{HEAD} differs from {embedding}, but the model's config ties them (tie_word_embeddings). "
                "Set it to false in config.json to use the head that the file holds."
            )


def entry(name: str, place: Place, part: str) -> str:
    """What a filled parameter is called in the cache: `model.layers.0.self_attn.q_proj.packed`."""
    return f"{name.removesuffix('.weight')}.{part}" if place.encodes else name


def slabs(first: int, last: int, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Row ranges of at most `SLAB_BYTES` in fp32, and at least one row."""
    row_bytes = 4 * (shape[1] if len(shape) > 1 else 1)
    step = max(1, SLAB_BYTES // row_bytes)
    for start in range(first, last, step):
        yield start, min(start + step, last)


def check(places: dict[str, Place], weights: Weights) -> None:
    """Law 7, before a byte is read: what has no place, what has no tensor, what has another shape. All of it in one message."""
    problems = []
    for name in sorted(weights.infos.keys() - places.keys()):
        reason = next((why for pattern, why in IGNORED.items() if re.fullmatch(pattern, name)), None)
        if reason is None:
            problems.append(f"{name}: the model has no place for it")
        else:
            log.info("%s is not read: %s", name, reason)
    problems += [f"{name}: no file holds it" for name in sorted(places.keys() - weights.infos.keys())]
    for name in sorted(places.keys() & weights.infos.keys()):
        if weights.infos[name].shape != places[name].shape:
            problems.append(f"{name}: {list(weights.infos[name].shape)} on disk, {list(places[name].shape)} in the model")
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise UserError(f"the model's files do not match its config. Is the download complete, and config.json the model's own?\n  {shown}")
