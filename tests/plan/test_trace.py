"""Law 8, what a step needs beside what stays: the simulated step of few layers against that of all, on real tensors and on fake."""

import importlib
import pkgutil
from dataclasses import replace
from typing import Any

import pytest
import torch

import burnish.adapt
import burnish.model
from burnish.adapt.attach import MAGNITUDE
from burnish.adapt.expand import growth
from burnish.adapt.methods import METHODS
from burnish.config import AdaptConfig, ModelConfig, Plan
from burnish.data.batches import Batch
from burnish.model import linear
from burnish.model.network import packed
from burnish.parallel.world import World
from burnish.plan import trace as tracing
from burnish.plan.few import Few, depth, few_layers, kinds_of, of_the_first, sample
from burnish.plan.live import GATHERED, Live
from burnish.plan.trace import (
    FORWARD,
    Trace,
    gradients_stay,
    pieces_of,
    recorded_step,
    replay,
    trace_forward,
    trace_generation,
    trace_step,
    worst_batch,
)
from burnish.skeleton import Built
from tests.plan.real_steps import CONTEXT, LAYERS, Cell, zeroed
from tests.tiny import FAMILIES, ONE, SIZES, a_plan

M = ModelConfig(path="tiny")


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def as_it_is(cell: Cell, batch: Batch | None = None) -> Trace:
    """The step of every layer on real tensors."""
    return of(zeroed(cell), cell.config.adapt, cell.plan, batch or worst_batch(CONTEXT, 1))


def of(built: Built, adapt: AdaptConfig, plan: Plan, batch: Batch, world: World = ONE) -> Trace:
    return replay(recorded_step(built, batch, world), range(len(built.layers)), gradients_stay(plan, adapt))


def simulated(cell: Cell, context: int = CONTEXT, **plan: Any) -> Trace:
    return trace_step(cell.net, cell.config.model, cell.config.adapt, replace(cell.plan, **plan), context)


CELLS = [
    *(Cell(family=family, checkpointing=True) for family in FAMILIES),
    Cell(family="gemma2", dtype="bf16"),
    Cell(method="lora", format="none", dtype="fp16"),
    Cell("full", "none", True, family="gemma2", dtype="bf16"),
    Cell("expand", "nf4", family="qwen2", dtype="bf16"),
    Cell(family="qwen2", dtype="bf16", model={"ends": "int8"}),
    Cell(family="gemma2", checkpointing=True, model={"ends": "int4"}),
    Cell(family="qwen2", checkpointing=True, model={"autocast": "bf16"}),
    Cell(model={"autocast": "fp16", "ends": "nf4"}),
]


@pytest.mark.parametrize(
    "cell", CELLS, ids=lambda cell: "-".join((cell.family, cell.method, cell.format, cell.dtype, *cell.model.values()))
)
def test_a_simulated_step_needs_what_the_real_one_needs(cell: Cell) -> None:
    found, right = simulated(cell), as_it_is(cell)
    # a thousandth or two KiB: a layer may free a number or two of each token that another one made, and losses are numbers
    assert found.kept == pytest.approx(right.kept, rel=0.001, abs=2048)
    assert found.peak == pytest.approx(right.peak, rel=0.001, abs=2048)
    assert found.at == right.at


DEEP = [
    ("llama", "dora", {}, {"strategy": "fsdp", "ranks": 2, "checkpointing": True}),
    ("gemma2", "lora", {}, {"strategy": "fsdp-grad", "ranks": 2}),
    ("llama", "dora", {}, {"strategy": "hybrid", "ranks": 4, "shard_ranks": 2, "checkpointing": True, "checkpoint_every": 2}),
    ("llama", "expand", {"new_blocks": 2}, {"strategy": "fsdp", "ranks": 2, "checkpointing": True}),
    ("llama", "full", {}, {}),
]


@pytest.mark.parametrize(("family", "method", "adapt", "plan"), DEEP)
def test_the_few_layers_extended_are_all_layers_simulated(family: str, method: str, adapt: Any, plan: Any, monkeypatch) -> None:
    """The law of extension, against a simulation of all twelve layers (with new blocks, of 26)."""
    depth = 24 if method == "expand" else 12
    cell = Cell(method, "none" if method == "full" else "nf4", family=family, adapt=adapt, sizes={"num_hidden_layers": depth})
    asked = (cell.net, cell.config.model, cell.config.adapt, a_plan(**plan), CONTEXT)
    extended = trace_step(*asked)
    grown = METHODS[method].growth(cell.net, cell.config.adapt)
    layers = depth + adapt.get("new_blocks", 0)
    assert few_layers(cell.net, cell.config.adapt, plan.get("checkpoint_every", 1)).config.num_hidden_layers < depth
    monkeypatch.setattr(tracing, "few_layers", lambda *_: Few(cell.net, grown, tuple(range(layers))))
    whole = trace_step(*asked)
    assert extended.peak == pytest.approx(whole.peak, rel=0.001, abs=1024)
    assert extended.kept == pytest.approx(whole.kept, rel=0.001, abs=1024)
    assert extended.parts.keys() == whole.parts.keys()
    assert ("gathered" in whole.parts) == ("ranks" in plan)


def test_layers_that_a_pattern_names_are_traced_as_if_it_named_all() -> None:
    config = FAMILIES["llama"](**(SIZES | {"num_hidden_layers": 30}))
    named = AdaptConfig(targets=("layers.2?.*.q_proj", "layers.2?.*.up_proj"), also=("layers.29.input_layernorm",))
    everywhere = AdaptConfig(targets=("q_proj", "up_proj"), also=("input_layernorm",))
    assert trace_step(config, M, named, a_plan(), CONTEXT) == trace_step(config, M, everywhere, a_plan(), CONTEXT)


@pytest.mark.parametrize("method", MAGNITUDE)
def test_kept_activations_are_what_autograd_saves(method: str) -> None:
    cell = Cell(method)
    built = zeroed(cell)
    saved = saved_for_backward(built, worst_batch(CONTEXT, 1))
    # beside what autograd is given, layers keep hidden states that only what follows them saves
    assert saved <= simulated(cell).kept <= 1.03 * saved


def saved_for_backward(built: Built, batch: Batch) -> int:
    """Bytes that autograd's own hooks see saved until the last decoder layer has run, without parameters."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*built.model.parameters(), *built.model.buffers()]}
    seen: dict[int, torch.Tensor] = {}
    at_the_end: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() and tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that no address is used twice
        return tensor

    built.layers[-1].register_forward_hook(lambda *_: at_the_end.append(sum(tensor.untyped_storage().nbytes() for tensor in seen.values())))
    built.model.train()
    with packed(built.model), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        built.model.loss_of(batch)  # pyright: ignore[reportCallIssue]
    return at_the_end[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_planned_peak_is_an_upper_bound_for_every_packing(checkpointing: bool) -> None:
    cell = Cell(family="gemma2", checkpointing=checkpointing)
    built = zeroed(cell)
    for lengths in ((64, 64), (20, 30, 14, 64), (5,) * 25, (64, 40), (64,)):
        bound = simulated(cell, micro_batch=-(-sum(lengths) // CONTEXT))
        assert of(built, cell.config.adapt, cell.plan, batch_of_lengths(lengths)).peak <= bound.peak
        built.model.zero_grad(set_to_none=True)


def test_samples_that_are_known_to_be_short_need_less_attention() -> None:
    whole, short = (worst_batch(64, 2, longest) for longest in (None, 20))
    assert whole.segments == (0, 64, 128, 129)
    assert short.segments == (0, 20, 40, 60, 64, 84, 104, 124, 128, 129)
    cell = Cell(family="gemma2")
    asked = (cell.net, cell.config.model, cell.config.adapt, cell.plan, CONTEXT)
    assert trace_step(*asked, longest=16).kept < trace_step(*asked).kept


def batch_of_lengths(lengths: tuple[int, ...]) -> Batch:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    ids = torch.zeros(1, ends[-1], dtype=torch.int64)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    source = torch.arange(ends[-1])
    return Batch(ids, positions, (0, *ends), source, torch.zeros_like(source), ())


def test_checkpointing_keeps_one_hidden_state_for_each_layer() -> None:
    kept = simulated(Cell("lora", checkpointing=True)).kept
    rotary = 4 * 2 * (CONTEXT + 1) * SIZES["head_dim"] + 2 * 8 * (CONTEXT + 1)  # cosines, sines and positions, which no layer makes
    states = LAYERS + 1  # what enters each layer, and what leaves the last
    assert 0 <= kept - states * (CONTEXT + 1) * SIZES["hidden_size"] * 4 <= rotary


def test_a_deeper_model_costs_no_more_to_trace_and_keeps_more() -> None:
    deep, flat = (Cell(sizes={"num_hidden_layers": layers}) for layers in (100, 5))
    assert depth(kinds_of(deep.net)) == depth(kinds_of(flat.net)) == 5 - 1 + 1
    assert simulated(deep).kept == pytest.approx(20 * simulated(flat).kept, rel=0.02)  # embeddings and rotary angles once


def test_every_kind_of_layer_is_traced() -> None:
    kinds = kinds_of(FAMILIES["gemma2"](**(SIZES | {"num_hidden_layers": 12})))
    few = depth(kinds)
    assert kinds[few - 2 : few] == kinds[-2:]
    assert [kinds[layer] for layer in of_the_first(kinds, few)] == kinds
    assert of_the_first(kinds, few)[-2:] == (few - 2, few - 1)


def test_layers_chosen_among_new_blocks_come_with_their_neighbours() -> None:
    config = FAMILIES["llama"](**(SIZES | {"num_hidden_layers": 40}))
    grown = growth(40, 4)
    kinds = kinds_of(config, grown)
    chosen = sample(kinds, grown)
    assert len(chosen) < 30
    assert {0, 1, 42, 43} <= set(chosen)
    first = grown.new[0]
    assert set(range(first - 3, first + 3)) <= set(chosen)


@pytest.mark.parametrize("rope", ["dynamic", "longrope", "llama3"])
def test_rotary_frequencies_that_depend_on_positions_are_no_obstacle(rope: str) -> None:
    parameters = {"rope_type": rope, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 128}
    parameters |= {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16} if rope == "longrope" else {}
    parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope == "llama3" else {}
    config = FAMILIES["llama"](**SIZES, rope_parameters=parameters)
    plain = trace_step(FAMILIES["llama"](**SIZES), M, AdaptConfig(), a_plan(), CONTEXT)
    assert trace_step(config, M, AdaptConfig(), a_plan(), CONTEXT) == plain
    assert config.rope_parameters["rope_type"] == rope


def test_a_gpu_decodes_larger_tiles_and_the_table_is_left_as_it_was() -> None:
    config = FAMILIES["llama"](**(SIZES | {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 1}))
    before = dict(linear.TILE_BYTES)
    cpu, cuda = (trace_step(config, M, AdaptConfig(), a_plan(device=device), CONTEXT) for device in ("cpu", "cuda"))
    assert before == linear.TILE_BYTES
    assert cuda.kept == cpu.kept
    assert cuda.peak > cpu.peak + 8192 * 1024 * 4 - 2 * linear.TILE_BYTES["cpu"]


def test_pieces_of_every_kind_are_a_gpus_inside_the_block_and_a_cpus_after_it() -> None:
    tables = [
        value
        for package in (burnish.model, burnish.adapt)
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
        for name, value in vars(importlib.import_module(module.name)).items()
        if name.endswith("_BYTES") and isinstance(value, dict)
    ]
    before = [dict(table) for table in tables]
    assert len(tables) >= 3
    assert all(table["cpu"] != table["cuda"] for table in tables)
    with pieces_of("cuda"):
        assert all(table["cpu"] == table["cuda"] for table in tables)
    assert tables == before


def test_a_forward_pass_alone_keeps_nothing() -> None:
    config, deep = (FAMILIES["llama"](**(SIZES | {"num_hidden_layers": layers})) for layers in (4, 50))
    first, second = (trace_forward(c, M, AdaptConfig(method="lora"), a_plan(), 4, CONTEXT) for c in (config, deep))
    assert first.peak == second.peak
    assert 0 < first.peak < trace_step(deep, M, AdaptConfig(), a_plan(micro_batch=4), CONTEXT).peak / 10


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_generation_keeps_keys_and_values_of_every_layer(family: str) -> None:
    config = FAMILIES[family](**(SIZES | {"num_hidden_layers": 40}))
    trace = trace_generation(config, M, AdaptConfig(method="lora"), a_plan(), 8, 100)
    cache = 40 * 2 * 8 * 100 * SIZES["num_key_value_heads"] * SIZES["head_dim"] * 4
    assert cache <= trace.peak <= 1.4 * cache  # and a copy of one layer's, hidden states, and one layer's work (Gemma's squares)


def test_ranks_are_imagined_and_gone_again() -> None:
    assert tracing.can_imagine()
    assert simulated(Cell(strategy="fsdp", ranks=2)).parts[GATHERED] > 0
    assert tracing.can_imagine()


def test_a_process_with_ranks_already_simulates_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "can_imagine", lambda: False)
    assert GATHERED not in simulated(Cell(strategy="fsdp", ranks=2)).parts


def test_live_counts_what_is_made_until_it_is_freed() -> None:
    known = torch.zeros(100)
    with Live([known]) as live:
        known[:50].add_(1)
        assert live.now == 0
        first = torch.ones(1000)
        view = first[:10]
        del first
        assert live.now == 4000
        del view
        assert live.now == 0
    assert live.peak == 4000


def test_live_follows_a_storage_that_is_resized_and_tells_kinds_apart() -> None:
    before = torch.UntypedStorage.resize_
    with Live([]) as live:
        gathered, gradient = torch.ones(1000), torch.ones(10)
        gathered.untyped_storage().resize_(0)
        live.tag(gradient, "gradients")
        assert dict(live.by) == {"work": 0, GATHERED: 0, "gradients": 40}
        gathered.untyped_storage().resize_(8000)
        assert (live.now, live.by[GATHERED], live.peak) == (8040, 8000, 8040)
        live.begin()
        del gathered
        assert (live.now, live.peak) == (40, 8040)
    assert torch.UntypedStorage.resize_ is before


def test_the_replay_adds_up_stretches_and_finds_the_fullest() -> None:
    count = tracing.Counter
    stretches = {
        (FORWARD, 0): tracing.Stretch(count(work=10), count(work=30)),
        ("head", 0): tracing.Stretch(count(work=1), count(work=5)),
        ("backward", 0): tracing.Stretch(count(work=-10, gradients=4), count(work=2, gradients=4)),
    }
    trace = replay(stretches, (0, 0, 0))
    assert (trace.kept, trace.at, trace.peak, trace.after) == (30, FORWARD, 50, 13)
    assert replay(stretches, (0, 0, 0), stay=True).after == 1
