"""Bytes last: one pass over the model's tensors, read → quantize → this rank's rows → their place.

Every tensor on disk is placed exactly once and every place is filled exactly once, or the run stops and names it. (A new block's places
are filled a second time from tensors that have a place in the base's own block: they are marked as copies, and counted apart.) At most a
slab of `SLAB_BYTES` of dense rows exists at a time, so no rank ever holds a dense matrix that is larger.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from burnish.errors import UserError
from burnish.load.cache import Cache, Writing
from burnish.load.weights import TensorInfo, Weights
from burnish.parallel.rows import local_rows, row_range
from burnish.parallel.world import any_rank

# A format holds some five copies of a slab while it encodes it: of 64 MiB they were 311 MiB above what the rank keeps (nf4, a layer of
# Llama-3-8B's shape), of 16 MiB they are 98, in the same time (benchmarks/loading.py).
SLAB_BYTES = 16 << 20
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
    source: str
    """The tensor of the files that it is filled from: of its own name, but in a model with new blocks."""
    encodes: bool = False
    copy: bool = False
    """Whether another place has the source too, of which this one is a copy: a new block's."""
    zero: bool = False
    """Zeros in the place of the source's values, which are not read."""
    looked_up: bool = False
    """Whether it is the embeddings."""

    def parameters(self) -> dict[str, Tensor]:
        """The parameters that are filled from it, as they are now (sharding replaces them)."""
        if not self.encodes:
            return {self.attribute: getattr(self.module, self.attribute)}
        return {name: parameter for name, parameter in self.module.named_parameters(recurse=False) if name != "bias"}

    @property
    def trained(self) -> bool:
        """Whether what it holds is trained: then it is no part of the quantized cache, and changes."""
        return any(parameter.requires_grad for parameter in self.parameters().values())

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


Origin = Callable[[str], tuple[str, bool, bool]]
"""Of a tensor of the model: what it is filled from, whether that has another place too, whether it starts at zero instead."""


def itself(name: str) -> tuple[str, bool, bool]:
    """The origin of every tensor of a model that is not expanded."""
    return name, False, False


def places_of(model: nn.Module, origin: Origin = itself) -> dict[str, Place]:
    """The place of each tensor by its name in the model. Taken before adapters wrap layers and change names. A tied parameter has one."""
    places: dict[str, Place] = {}
    seen: set[int] = set()

    def add(name: str, module: nn.Module, attribute: str, shape: tuple[int, ...], encodes: bool) -> None:
        source, copy, zero = origin(name)
        places[name] = Place(module, attribute, shape, source, encodes, copy, zero, isinstance(module, nn.Embedding) or module in tables)

    # quantized embeddings wrap their matrix, which may be the head: files call it by the embeddings' name
    tables = {module.table: prefix for prefix, module in model.named_modules() if hasattr(module, "table")}
    for own_name, module in model.named_modules():
        encodes, prefix = hasattr(module, "encode"), tables.get(module, own_name)
        if encodes:
            add(f"{prefix}.weight", module, "weight", (module.out_features, module.in_features), True)  # pyright: ignore
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen and (not encodes or name == "bias"):
                seen.add(id(parameter))
                add(f"{prefix}.{name}", module, name, tuple(parameter.shape), False)
    return places


def kept_out(places: dict[str, Place]) -> tuple[str, ...]:
    """Tensors of the base that are not in its quantized cache, since they are trained."""
    return tuple(sorted(place.source for place in places.values() if place.trained and not place.copy))


def fill(
    places: dict[str, Place], weights: Weights, cache: Cache | None, device: torch.device, advance: Callable[[int], None] = lambda _: None
) -> None:
    """Fills every place, from the quantized cache where it has this model, and into it where it has not.

    `advance` is told the bytes read.
    """
    check(places, weights)
    frozen = {name: place for name, place in places.items() if not place.trained}
    trained = {name: place for name, place in places.items() if place.trained}
    parameters = {entry(place, part): parameter for place in frozen.values() for part, parameter in place.parameters().items()}
    if cache is not None and not any_rank(not cache.holds(parameters), device):  # all ranks or none: a cache may lie on one machine's disk
        for name, parameter in parameters.items():
            local_rows(parameter).copy_(cache.read(name, *row_range(parameter)))
        advance(sum(weights.infos[place.source].bytes for place in frozen.values()))
        read(trained, weights, None, device, advance)
        return
    check_tied(places, weights)
    writing = cache.start(parameters, device) if cache else None
    try:
        read(frozen, weights, writing, device, advance)
        if writing:
            writing.finish(device)
    finally:
        if writing:
            writing.close()
    read(trained, weights, None, device, advance)


def read(
    places: dict[str, Place],
    weights: Weights,
    writing: Writing | None,
    device: torch.device,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Fills these places from the files, whatever others there are; puts what it encodes into the cache that is being written."""
    for place in places.values():
        first, last = place.rows()
        if place.zero:
            for parameter in place.parameters().values():
                with torch.no_grad():
                    local_rows(parameter).zero_()
            continue
        for start, stop in slabs(first, last, place.shape):
            with torch.no_grad():
                encoded = _rows(place, weights, start, stop, device)
                for part, parameter in place.parameters().items():
                    mine = local_rows(parameter)[start - first : stop - first]
                    mine.copy_(encoded[part])
                    if writing:
                        writing.rows(entry(place, part), start, mine)
        advance(weights.infos[place.source].bytes * (last - first) // max(1, place.shape[0]))


def _rows(place: Place, weights: Weights, start: int, stop: int, device: torch.device) -> dict[str, Tensor]:
    """What goes into the place's parameters for some rows: the file's own bytes where it holds them in the layer's format."""
    if place.adopts(weights.infos[place.source]):
        return place.adopt({part: tensor.to(device) for part, tensor in weights.stored_rows(place.source, start, stop).items()})
    return place.encode(weights.rows(place.source, start, stop).to(device))


def quantizes(places: dict[str, Place], weights: Weights) -> bool:
    """Whether filling costs a quantization, which a cache would save: not where the file holds all as the layers do."""
    infos = weights.infos  # a tensor that is missing is named by `check`
    encoding = [place for place in places.values() if place.encodes]
    dense = [place.module for place in encoding if not (place.source in infos and place.adopts(infos[place.source]))]
    return any(module.format_name != "none" for module in dense)


def check_tied(places: dict[str, Place], weights: Weights) -> None:
    """Where the config ties the head to the embeddings and the file holds a head all the same, it must be the same: told by a few rows.

    transformers only warns and leaves such a model untied, so that ours would answer otherwise.
    """
    embedding = next((name for name, place in places.items() if place.looked_up), None)
    if embedding is None or HEAD in places or HEAD not in weights.infos:
        return
    count = places[embedding].shape[0]
    for row in range(0, count, max(1, count // 16)):
        if not torch.equal(weights.rows(HEAD, row, row + 1).float(), weights.rows(embedding, row, row + 1).float()):
            raise UserError(
                f"{HEAD} differs from {embedding}, but the model's config ties them (tie_word_embeddings). "
                "Set it to false in config.json to use the head that the file holds."
            )


def entry(place: Place, part: str) -> str:
    """What a filled parameter is called in the cache: `model.layers.0.self_attn.q_proj.packed`. By the base's names, so that an expanded
    model has the cache of its base."""
    return f"{place.source.removesuffix('.weight')}.{part}" if place.encodes else place.source


def slabs(first: int, last: int, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Row ranges of at most `SLAB_BYTES` in fp32, and at least one row."""
    row_bytes = 4 * (shape[1] if len(shape) > 1 else 1)
    step = max(1, SLAB_BYTES // row_bytes)
    for start in range(first, last, step):
        yield start, min(start + step, last)


def check(places: dict[str, Place], weights: Weights) -> None:
    """Law 7, before a byte is read: what has no place, what has no tensor, what has another shape. All of it in one message.

    A tensor has one place that is no copy, and each copy's tensor has one too: only a faulty `origin` could break that.
    """
    sources = Counter(place.source for place in places.values() if not place.copy)
    assert all(count == 1 for count in sources.values()), f"{sources.most_common(1)[0][0]} has two places"
    assert all(place.source in sources for place in places.values()), "a copy of a tensor that has no place of its own"
    problems = []
    for name in sorted(weights.infos.keys() - sources.keys()):
        reason = next((why for pattern, why in IGNORED.items() if re.fullmatch(pattern, name)), None)
        if reason is None:
            problems.append(f"{name}: the model has no place for it")
        else:
            log.info("%s is not read: %s", name, reason)
    problems += [f"{name}: no file holds it" for name in sorted(sources.keys() - weights.infos.keys())]
    for place in places.values():
        if place.source in weights.infos and not place.copy and weights.infos[place.source].shape != place.shape:
            problems.append(f"{place.source}: {list(weights.infos[place.source].shape)} on disk, {list(place.shape)} in the model")
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise UserError(f"the model's files do not match its config. Is the download complete, and config.json the model's own?\n  {shown}")
