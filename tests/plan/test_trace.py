"""Law 8, what a step needs beside what stays: the trace of shapes against the same step on real tensors, counted in two ways."""

from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.adapt.attach import MAGNITUDE
from burnish.config import AdaptConfig, ModelConfig, Plan
from burnish.data.batches import Batch
from burnish.model import linear
from burnish.model.network import packed
from burnish.plan.trace import Live, Trace, depth, kinds_of, trace_forward, trace_step, traced, worst_batch
from burnish.skeleton import Built
from tests.layers import METHODS_AND_KINDS
from tests.tiny import FAMILIES, SIZES, a_plan, asked, built_from, tiny_folder

LAYERS, CONTEXT = 5, 64


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def both(
    folder: Path, family: str, plan: Plan, model: dict[str, Any] | None = None, context: int = CONTEXT, **adapt: Any
) -> tuple[Built, Trace]:
    """A real model of five layers, and the trace of its step from its config alone."""
    built = built_from(tiny_folder(folder, family, num_hidden_layers=LAYERS), model, adapt, plan)
    for parameter in built.adapters.trainable().values():
        parameter.grad = torch.zeros_like(parameter)
    section = AdaptConfig(**({"rank": 8, "alpha": 16.0} | adapt))
    config = FAMILIES[family](**(SIZES | {"num_hidden_layers": LAYERS}))
    return built, trace_step(config, asked("tiny", model), section, plan, context)


def compare(built: Built, trace: Trace, plan: Plan, context: int = CONTEXT) -> None:
    kept, live = traced(built, worst_batch(context, plan.micro_batch))
    # a thousandth: a layer may free a few bytes that another one made
    assert trace.kept == pytest.approx(sum(kept), rel=0.001)
    assert trace.peak == pytest.approx(max(live.peaks.values()), rel=0.001)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_traced_step_needs_what_the_real_one_needs(family: str, checkpointing: bool, tmp_path: Path) -> None:
    plan = a_plan(checkpointing=checkpointing, micro_batch=2)
    compare(*both(tmp_path, family, plan), plan)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("method", "name"), METHODS_AND_KINDS)
def test_a_traced_step_needs_what_the_real_one_needs_in_every_format(method: str, name: str, dtype: str, tmp_path: Path) -> None:
    plan = a_plan(dtype=dtype)
    compare(*both(tmp_path, "llama", plan, {"format": name}, method=method, dropout=0.1), plan)


CELLS = [
    ("full", "llama", "fp32", False),
    ("full", "gemma2", "bf16", True),
    ("expand", "llama", "fp32", False),
    ("expand", "gemma2", "bf16", False),
    ("expand", "qwen2", "fp32", True),
]


@pytest.mark.parametrize(("method", "family", "dtype", "checkpointing"), CELLS)
def test_a_traced_step_needs_what_the_real_one_needs_where_weights_are_trained(
    method: str, family: str, dtype: str, checkpointing: bool, tmp_path: Path
) -> None:
    plan = a_plan(dtype=dtype, checkpointing=checkpointing)
    model = {"format": "none" if method == "full" else "nf4"}
    adapt = {"method": method} | ({"new_blocks": 2} if method == "expand" else {})
    compare(*both(tmp_path, family, plan, model, **adapt), plan)


def test_layers_that_a_pattern_names_are_traced_as_if_it_named_all(tmp_path: Path) -> None:
    def traced_with(**adapt: Any) -> Trace:
        config = FAMILIES["llama"](**(SIZES | {"num_hidden_layers": 30}))
        return trace_step(config, ModelConfig(path="tiny"), AdaptConfig(**adapt), a_plan(), CONTEXT)

    named = traced_with(targets=("layers.2?.*.q_proj", "layers.2?.*.up_proj"), also=("layers.29.input_layernorm",))
    assert named == traced_with(targets=("q_proj", "up_proj"), also=("input_layernorm",))


def test_gradients_are_not_counted_again_where_they_outweigh_activations(tmp_path: Path) -> None:
    plan = a_plan(checkpointing=True)
    compare(*both(tmp_path, "llama", plan, context=16, rank=64), plan, context=16)


@pytest.mark.parametrize("method", MAGNITUDE)
def test_kept_activations_are_what_autograd_saves(method: str, tmp_path: Path) -> None:
    built, trace = both(tmp_path, "llama", a_plan(), method=method)
    saved = saved_for_backward(built, worst_batch(CONTEXT, 1))
    # beside what autograd is given, the layers keep their gains (4 bytes for each output): 2 % of it at 64 tokens
    assert saved <= trace.kept <= 1.03 * saved


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
@pytest.mark.parametrize("lengths", [(64, 64), (20, 30, 14, 64), (5,) * 25, (64, 40), (64,)])
def test_the_planned_peak_is_an_upper_bound_for_every_packing(lengths: tuple[int, ...], checkpointing: bool, tmp_path: Path) -> None:
    plan = a_plan(checkpointing=checkpointing, micro_batch=-(-sum(lengths) // CONTEXT))
    built, trace = both(tmp_path, "gemma2", plan)
    _, live = traced(built, batch_of_lengths(lengths))
    assert max(live.peaks.values()) <= trace.peak


def batch_of_lengths(lengths: tuple[int, ...]) -> Batch:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    ids = torch.zeros(1, ends[-1], dtype=torch.int64)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    source = torch.arange(ends[-1])
    return Batch(ids, positions, (0, *ends), source, torch.zeros_like(source), ())


def test_checkpointing_keeps_one_hidden_state_for_each_layer() -> None:
    trace = trace_step(
        FAMILIES["llama"](**SIZES), ModelConfig(path="tiny"), AdaptConfig(method="lora"), a_plan(checkpointing=True), CONTEXT
    )
    assert trace.kept == SIZES["num_hidden_layers"] * (CONTEXT + 1) * SIZES["hidden_size"] * 4


def test_a_deeper_model_costs_no_more_to_trace_and_keeps_more() -> None:
    config = FAMILIES["llama"](**(SIZES | {"num_hidden_layers": 100}))
    assert depth(kinds_of(config)) == 3
    deep = trace_step(config, ModelConfig(path="tiny"), AdaptConfig(), a_plan(), CONTEXT)
    shallow = FAMILIES["llama"](**(SIZES | {"num_hidden_layers": 4}))
    flat = trace_step(shallow, ModelConfig(path="tiny"), AdaptConfig(), a_plan(), CONTEXT)
    assert deep.kept == pytest.approx(25 * flat.kept, rel=0.01)
    assert (deep.head, deep.layers) == (flat.head, flat.layers)


def test_every_kind_of_layer_is_traced() -> None:
    kinds = kinds_of(FAMILIES["gemma2"](**(SIZES | {"num_hidden_layers": 6})))
    assert set(kinds[: depth(kinds)]) == {"sliding_attention", "full_attention"}


@pytest.mark.parametrize("rope", ["dynamic", "longrope", "yarn", "llama3", "linear"])
def test_rotary_frequencies_that_depend_on_positions_are_no_obstacle(rope: str) -> None:
    parameters = {"rope_type": rope, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 128}
    parameters |= {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16} if rope == "longrope" else {}
    parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope == "llama3" else {}
    config = FAMILIES["llama"](**SIZES, rope_parameters=parameters)
    plain = trace_step(FAMILIES["llama"](**SIZES), ModelConfig(path="tiny"), AdaptConfig(), a_plan(), CONTEXT)
    assert trace_step(config, ModelConfig(path="tiny"), AdaptConfig(), a_plan(), CONTEXT) == plain
    assert config.rope_parameters["rope_type"] == rope


def test_a_gpu_decodes_larger_tiles_and_the_table_is_left_as_it_was() -> None:
    config = FAMILIES["llama"](**(SIZES | {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 1}))
    before = dict(linear.TILE_BYTES)
    cpu, cuda = (trace_step(config, ModelConfig(path="tiny"), AdaptConfig(), a_plan(device=device), CONTEXT) for device in ("cpu", "cuda"))
    assert before == linear.TILE_BYTES
    assert cuda.kept == cpu.kept
    assert cuda.layers > cpu.layers + 8192 * 1024 * 4 - 2 * linear.TILE_BYTES["cpu"]


def test_a_forward_pass_alone_keeps_nothing() -> None:
    config = FAMILIES["llama"](**SIZES)
    deep = FAMILIES["llama"](**(SIZES | {"num_hidden_layers": 50}))
    first, second = (trace_forward(c, ModelConfig(path="tiny"), AdaptConfig(method="lora"), a_plan(), 4, CONTEXT) for c in (config, deep))
    assert first == second
    step = trace_step(deep, ModelConfig(path="tiny"), AdaptConfig(), a_plan(micro_batch=4), CONTEXT)
    assert 0 < first.peak < step.peak / 10


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
    assert live.peaks == {"layers": 4000}
