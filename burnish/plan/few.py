"""A model of few decoder layers that stands for one of many: which layers, and what each of the others is like."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from burnish.adapt.expand import Growth, with_blocks
from burnish.adapt.methods import METHODS
from burnish.adapt.targets import is_pattern
from burnish.config import AdaptConfig, ModelConfig, Plan
from burnish.load.weights import TensorInfo
from burnish.parallel.world import World
from burnish.plan.bytes import NOWHERE, meta
from burnish.skeleton import Built, skeleton

Infos = Mapping[str, TensorInfo] | None
"""What the base's files hold: see `skeleton`."""


@dataclass(frozen=True)
class Few:
    """What is built in the place of the whole."""

    config: PretrainedConfig
    growth: Growth | None
    stands_for: tuple[int, ...]
    """For each layer of the whole model, the layer of the few that it is like."""


def few_layers(config: PretrainedConfig, adapt: AdaptConfig, every: int = 1) -> Few:
    """The fewest layers that have what all have: the first two, one of each kind inside, and the last two, which differ for their
    neighbours' sake. `every`: where only one of so many layers is recomputed."""
    growth = METHODS[adapt.method].growth(config, adapt)
    kinds = kinds_of(config, growth, every)
    if growth is None:
        few = depth(kinds)
        return Few(shallow(config, list(range(few))), None, of_the_first(kinds, few))
    # a sample would be recomputed at other places than the whole
    chosen = sample(kinds, growth) if every == 1 else list(range(len(kinds)))
    own = [growth.sources[layer] for layer in chosen if layer not in growth.new]
    return Few(shallow(config, own), regrown(chosen, growth), of_a_sample(kinds, chosen))


def of_the_first(kinds: list[str], few: int) -> tuple[int, ...]:
    """`stands_for` of the first few: the last two stand for the last two of all, the innermost of each kind for all others."""
    inside = {kind: layer for layer, kind in enumerate(kinds[: max(few - 2, 1)])}
    ends = {layer: layer for layer in range(min(2, few))} | {len(kinds) - back: few - back for back in (1, 2)[:few]}
    return tuple(range(few)) if few == len(kinds) else tuple(ends.get(layer, inside.get(kind, 0)) for layer, kind in enumerate(kinds))


def of_a_sample(kinds: list[str], chosen: list[int]) -> tuple[int, ...]:
    """`stands_for` of layers from all over: the first that was chosen of the same kind between the same neighbours."""
    between = _between(kinds)
    known = {between[layer]: at for at, layer in reversed(list(enumerate(chosen))) if layer > 1 or layer + 1 == len(kinds)}
    own = {layer: at for at, layer in enumerate(chosen)}
    return tuple(own.get(layer, known.get(kind, 0)) for layer, kind in enumerate(between))


def _between(kinds: list[str]) -> list[tuple[str, ...]]:
    around = ["", "", *kinds, "", ""]  # FSDP2 gathers a layer while its neighbour runs, and sends a gradient off while the next does
    return [tuple(around[layer : layer + 5]) for layer in range(len(kinds))]


def depth(kinds: list[str]) -> int:
    """The fewest layers, from the first on, that end as all do and have every kind between the first two and the last two."""
    inside = set(kinds[2:-2])
    for few in range(4, len(kinds)):
        if kinds[few - 2 : few] == kinds[-2:] and inside <= set(kinds[2 : few - 2]):
            return few
    return len(kinds)


def kinds_of(config: PretrainedConfig, growth: Growth | None = None, every: int = 1) -> list[str]:
    """The kind of each decoder layer: full or sliding attention, where a family mixes them; recomputed or not, where not all are; where
    blocks are added, whether it is a new one, or lies before the first of them (it then has no backward pass) or after."""
    kinds = list(getattr(config, "layer_types", None) or ["decoder layer"] * config.num_hidden_layers)
    if growth is not None:
        first = growth.new[0]
        kinds = [
            f"{kinds[source]}, {'new' if layer in growth.new else 'after' if layer > first else 'before'}"
            for layer, source in enumerate(growth.sources)
        ]
    return [f"{kind}, recomputed" if every > 1 and not number % every else kind for number, kind in enumerate(kinds)]


def sample(kinds: list[str], growth: Growth) -> list[int]:
    """The first layer of each kind between the same neighbours, two on each side, with these; the first two and the last two
    of all; and what the new ones among them are copies of."""
    between = _between(kinds)
    first = [layer for layer in range(2, len(kinds)) if between[layer] not in between[2:layer]]
    chosen = {near for layer in first for near in range(layer - 2, layer + 3)} | {0, 1, len(kinds) - 2, len(kinds) - 1}
    chosen = {layer for layer in chosen if 0 <= layer < len(kinds)}
    return sorted(chosen | {layer - 1 for layer in chosen if layer in growth.new})


def regrown(chosen: list[int], growth: Growth) -> Growth:
    """The chosen layers as a growth of their own."""
    sources: list[int] = []
    for layer in chosen:
        sources.append(sources[-1] if layer in growth.new else len(set(sources)))
    return Growth(tuple(sources), tuple(at for at, layer in enumerate(chosen) if layer in growth.new))


def everywhere(config: PretrainedConfig, model: ModelConfig, adapt: AdaptConfig, plan: Plan, infos: Infos) -> AdaptConfig:
    """The same method where patterns name some layers: on all of them what it does on any, so that few stand for all. An upper bound."""
    if not any(is_pattern(target) for target in (*adapt.targets, *adapt.also)):
        return adapt
    trained = meta(config, model, adapt, plan, infos).adapters
    whole = {name.rpartition(".")[2] for entry in trained.whole.values() for name, _ in entry.modules}
    adapted = {name.rpartition(".")[2] for name in trained.by_name}
    if not METHODS[adapt.method].adapts:
        return replace(adapt, targets=tuple(sorted(whole)))
    return replace(adapt, targets=tuple(sorted(adapted)), also=tuple(sorted(whole)))


def built_few(few: Few, model: ModelConfig, adapt: AdaptConfig, plan: Plan, infos: Infos, world: World | None = None) -> Built:
    """The few layers on meta; sharded as the plan says where there is a world for it."""
    if world is None:
        plan, world = replace(plan, strategy="single", ranks=1), NOWHERE
    return skeleton(few.config, model, adapt, plan, world, infos, few.growth)


def shallow(config: PretrainedConfig, layers: list[int]) -> PretrainedConfig:
    """The same model with some of its decoder layers, and rotary frequencies that need no values of positions (shapes are the same)."""
    config = with_blocks(config, layers)
    rope = getattr(config, "rope_parameters", None) or {}
    for table in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if table.get("rope_type") in ("dynamic", "longrope"):
            table["rope_type"] = "default"
    return config
