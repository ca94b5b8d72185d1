"""The original's `model_state_dict.safetensors` → an adapter folder in PEFT's format, or a model folder with its trained blocks in it.

The original wrote neither configuration nor alpha nor the name of the base: whoever imports has to say them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from burnish.adapt.disk import about_adapter, save_adapter
from burnish.adapt.expand import with_blocks
from burnish.compat.state import LAYER, Layout, State, read_state
from burnish.config import AdaptConfig, ModelConfig, Plan
from burnish.data.rows import listed
from burnish.data.template import choose_template
from burnish.errors import UserError
from burnish.export.shards import Shards
from burnish.load.pretrained import Pretrained, find_model, read_tokenizer
from burnish.load.weights import Weights, open_weights
from burnish.parallel.world import alone
from burnish.runs import whole_folder
from burnish.skeleton import Built, skeleton
from burnish.words import counted

SHARD_BYTES = 5_000_000_000
CONTEXT = 512  # --context_length, where nobody said otherwise


@dataclass(frozen=True)
class Trained:
    """How the file was trained, as far as it does not say so itself; the defaults are the original's."""

    model: ModelConfig
    """The base, and the format that it was held in."""
    alpha: float = 16.0
    """`--lora_alpha`. Not read for DoRA, which ignored it."""
    context: int = CONTEXT
    template: str = "auto"


def import_state(file: Path, trained: Trained, out: Path) -> str:
    """Writes `out`, whole or not at all, and says in words what it is. `burnish.json` of an adapter names the base's fingerprint.

    An adapter's base is not read beyond its header and sampled pages, whatever its size; blocks are put into a copy of it, tensor by
    tensor. Raises a `UserError` for an unknown layout, a shape that does not fit the base, and what no adapter can express.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} stands there already. Give a new folder's name, or remove it.")
    state = read_state(file)
    if state.layout is None:
        return import_blocks(state, find_model(trained.model), out)
    return import_adapter(state, state.layout, trained, out)


# --- adapters


def import_adapter(state: State, layout: Layout, trained: Trained, out: Path) -> str:
    """The adapter, put into our model on meta and saved as any of ours is."""
    adapt = _adapt(state, layout, trained.alpha)
    pretrained = find_model(trained.model)
    dtype = "bf16" if trained.model.dtype == "auto" else trained.model.dtype
    plan = Plan(device="cpu", ranks=1, strategy="single", dtype=dtype, micro_batch=1, accumulation=1, checkpointing=False)
    built = skeleton(pretrained.config, trained.model, adapt, plan, alone("cpu"))
    _check_fit(state, built)
    for name, adapter in built.adapters.by_name.items():
        for part in layout.parts:
            setattr(adapter, part, nn.Parameter(state.tensor(name, part).float()))
    template = choose_template(read_tokenizer(pretrained), trained.template)
    said = {"name": template.name, "jinja": template.jinja, "system": template.system}
    about = about_adapter(trained.model, plan, open_weights(pretrained).fingerprint(), said, trained.context)
    save_adapter(built.adapters, adapt, out, about, [name for name, _ in built.model.named_modules()])
    kinds = ", ".join(adapt.targets)
    return f"{out}: a {adapt.method} adapter in PEFT's format, rank {adapt.rank}, alpha {adapt.alpha:g}, on {kinds}"


def _adapt(state: State, layout: Layout, alpha: float) -> AdaptConfig:
    layers = sorted({layer for layer, _ in state.keys})
    ranks = {state.shapes[state.keys[layer, "a"]][0] for layer in layers if state.shapes[state.keys[layer, "a"]]}
    if len(ranks) != 1:
        raise UserError(
            f"{state.file}: its layers have several ranks ({', '.join(map(str, sorted(ranks)))}); the original gave all of them one."
        )
    (rank,) = ranks
    targets = tuple(sorted({layer.rpartition(".")[2] for layer in layers}))
    return AdaptConfig(method=layout.method, rank=rank, alpha=alpha if layout.method == "lora" else float(rank), targets=targets)


def _check_fit(state: State, built: Built) -> None:
    """Every tensor of the file has its place, every place its tensor, and both one shape; and nothing is asked that cannot be expressed."""
    places = {(name, part): value for name, part, value in _parts(built)}
    problems = [f"{state.keys[key]}: the model has no place for it" for key in sorted(state.keys.keys() - places.keys())]
    problems += [f"{layer}: the file does not hold its {part}" for layer, part in sorted(places.keys() - state.keys.keys())]
    for key in sorted(state.keys.keys() & places.keys()):
        found = state.shapes[state.keys[key]]
        if found != tuple(places[key].shape):
            problems.append(f"{state.keys[key]}: {list(found)} in the file, {list(places[key].shape)} in the model")
    if problems:
        raise UserError(listed(f"{state.file} does not fit this base.", problems))
    biased = sorted(name for name, adapter in built.adapters.by_name.items() if adapter.m is not None and adapter.base.bias is not None)
    if biased:
        raise UserError(
            f"{state.file}: the original's DoRA also scaled the bias of {biased[0]} (and of {len(biased) - 1} more layers), which no DoRA "
            "adapter can express. Train it anew; burnish leaves the bias alone."
        )


def _parts(built: Built) -> Iterator[tuple[str, str, Tensor]]:
    for name, adapter in built.adapters.by_name.items():
        for part in ("a", "b", "m"):
            value = getattr(adapter, part)
            if value is not None:
                yield name, part, value


# --- blocks


def import_blocks(state: State, pretrained: Pretrained, out: Path) -> str:
    """A whole model: the base with the trained blocks in their places, in the dtype that they were saved in."""
    base = open_weights(pretrained)
    numbers = sorted({int(number) for number, _ in state.keys})
    old = pretrained.config.num_hidden_layers
    places = [number for number in range(old + len(numbers)) if number not in numbers]
    if len(places) != old:
        raise UserError(
            f"{state.file} holds the blocks {', '.join(map(str, numbers))}: with {old} layers of the base that makes {old + len(numbers)} "
            f"layers, which have no block {numbers[-1]}. Is it another base's?"
        )
    _check_blocks(state, base, numbers)
    first = state.tensor(*next(iter(state.keys)))
    with whole_folder(out) as folder:
        sources = dict(_sources(state, base, places))
        shapes = {name: state.shapes[source] if in_state else base.infos[source].shape for name, (in_state, source) in sources.items()}
        shards = Shards(folder, shapes, first.dtype, SHARD_BYTES)
        of_key = {key: number_and_name for number_and_name, key in state.keys.items()}
        for name, (in_state, source) in sources.items():
            value = state.tensor(*of_key[source]) if in_state else base.rows(source, 0, (base.infos[source].shape or (1,))[0])
            shards.add(name, [value.to(first.dtype)])
        shards.finish()
        with_blocks(pretrained.config, sources_of(old, numbers)).save_pretrained(folder)
        read_tokenizer(pretrained).save_pretrained(folder)
    return f"{out}: a model of {counted(old + len(numbers), 'layer')}, of which {', '.join(map(str, numbers))} are the trained blocks"


def _check_blocks(state: State, base: Weights, numbers: list[int]) -> None:
    """Each block has the tensors of a layer of the base, in the same shapes."""
    model = {found[3]: info.shape for name, info in base.infos.items() if (found := LAYER.match(name)) is not None and found[2] == "0"}
    problems = []
    for number in numbers:
        block = {name: state.shapes[key] for (of, name), key in state.keys.items() if int(of) == number}
        problems += [f"block {number} lacks {name}" for name in sorted(model.keys() - block.keys())]
        problems += [f"block {number} holds {name}, which the base's layers lack" for name in sorted(block.keys() - model.keys())]
        differ = sorted(name for name in model.keys() & block.keys() if model[name] != block[name])
        problems += [f"block {number}: {name} is {list(block[name])}, in the base {list(model[name])}" for name in differ]
    if problems:
        raise UserError(listed(f"{state.file} does not fit this base.", problems))


def _sources(state: State, base: Weights, places: list[int]) -> Iterator[tuple[str, tuple[bool, str]]]:
    """Name in the expanded model → whether it comes from the file, and its name there or in the base."""
    prefix = next(found[1] for name in base.infos if (found := LAYER.match(name)) is not None)
    for name in base.infos:
        found = LAYER.match(name)
        yield (name if found is None else f"{found[1]}{places[int(found[2])]}.{found[3]}"), (False, name)
    for (number, rest), key in state.keys.items():
        yield f"{prefix}{number}.{rest}", (True, key)


def sources_of(old: int, numbers: list[int]) -> list[int]:
    """Of each layer of the expanded model the base's layer that it is, or that a block at `numbers` began as a copy of (the one before)."""
    sources = list(range(old))
    for number in numbers:
        sources.insert(number, sources[max(number - 1, 0)])
    return sources
