"""docs/precision.md says what each setting stores and computes in; each cell of its tables is read off a model, not believed."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.config import ModelConfig, TrainConfig
from burnish.model.network import DTYPES, head_of, hidden_states, packed
from burnish.plan.trace import worst_batch
from burnish.train.optimizer import OPTIMIZERS, build, moments_of_a_part
from burnish.train.scaler import START, begin
from tests.plan.test_trace import batch_of_lengths
from tests.tiny import a_plan, built_from, tiny_folder

PAGE = Path(__file__).parents[2] / "docs" / "precision.md"
NAMES = {kind: name for name, kind in DTYPES.items()} | {torch.uint8: "uint8", torch.int8: "int8"}
SETTINGS: dict[str, tuple[str, dict[str, str]]] = {name: (name, {}) for name in DTYPES}
SETTINGS |= {f"fp32, autocast {name}": ("fp32", {"autocast": name}) for name in ("bf16", "fp16")}
"""A row of the page's first table: compute dtype, and what else is set in `[model]`."""


def table(after: str) -> dict[str, dict[str, str]]:
    """The first table after a heading: its first column → column → cell."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").partition(f"## {after}")[2].splitlines() if line.startswith("|")]
    rows = [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines[: _end(lines)]]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


def _end(lines: list[str]) -> int:
    """Where a second table begins: at its line of dashes, less its head."""
    dashes = [number for number, line in enumerate(lines) if re.fullmatch(r"[|\s:-]+", line)]
    return dashes[1] - 1 if len(dashes) > 1 else len(lines)


ENDS = [name for name in ModelConfig.__dataclass_fields__["ends"].type.__args__ if name != "stored"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("precision") / "model", "qwen2", num_hidden_layers=1)


def measured(folder: Path, dtype: str, model: dict[str, str]) -> dict[str, str]:
    """One forward and backward pass, looked at where the table's columns say."""
    plan = a_plan(dtype=dtype)
    built, dense = built_from(folder, model, plan=plan), built_from(folder, {"format": "none"} | model, plan=plan)
    name, adapter = next(iter(built.adapters.by_name.items()))
    seen: dict[str, torch.Tensor] = {}
    built.layers[0].register_forward_hook(
        lambda module, inputs, output: seen.update(stream=output[0] if isinstance(output, tuple) else output)
    )
    adapter.register_forward_hook(lambda module, inputs, output: seen.update(product=output))
    built.model.train()
    with packed(built.model):
        hidden = hidden_states(built.model, batch_of_lengths((9,)))
        loss = built.model.loss_of(worst_batch(8, 1))
        loss.backward()
    update = build(built.adapters.trainable(), TrainConfig())
    norm = next(part for part, _ in built.model.named_parameters() if part.endswith("input_layernorm.weight"))
    head = head_of(built.model).weight
    kept = {head.dtype, built.model.get_parameter(norm).dtype, dense.linears[name].weight.dtype, hidden.dtype}
    assert len(kept) == 1, "embeddings, norms, head and dense weights differ"
    trained = {parameter.dtype for parameter in built.adapters.trainable().values()}
    gradients = {parameter.grad.dtype for parameter in built.adapters.trainable().values()}
    kinds: dict[str, Any] = {
        "embeddings, norms, head, `none` weights": head.dtype,
        "`nf4` scales": built.linears[name].scale.dtype,
        "‖W‖²": built.linears[name].norm2.dtype,
        "A, B, m": trained.pop(),
        "gradients": gradients.pop(),
        "moments of `adamw`": update.state[adapter.a]["exp_avg"].dtype,
        "residual stream": seen["stream"].dtype,
        "products": seen["product"].dtype,
        "gain d": adapter.d.dtype,
        "loss": loss.dtype,
    }
    assert not trained
    assert not gradients
    return {column: NAMES[kind] for column, kind in kinds.items()} | {"loss × at first": f"{begin(built.products, START, 0).scale:g}"}


@pytest.mark.parametrize("row", SETTINGS)
def test_each_setting_stores_and_computes_in_what_the_page_says(folder, row):
    found = {column.replace("`", ""): cell for column, cell in measured(folder, *SETTINGS[row]).items()}
    assert found == table("model.dtype")[row]


@pytest.mark.parametrize("ends", ENDS)
def test_embeddings_and_head_are_held_and_computed_as_the_page_says(folder, ends):
    model = built_from(folder, {"ends": ends}, plan=a_plan(dtype="bf16")).model
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = embeddings(torch.tensor([[3, 4]]))
    assert head(rows).dtype == rows.dtype
    largest = max(head.parameters(), key=lambda tensor: tensor.numel())
    per_number = (sum(tensor.numel() * tensor.dtype.itemsize for tensor in head.parameters())) / (320 * 128)
    said = table("model.ends")[ends]
    assert [NAMES[largest.dtype], NAMES[rows.dtype]] == [said["held as"], said["looked up and multiplied in"]]
    assert per_number == pytest.approx(float(said["bytes a number"]), abs=0.06)  # to one decimal; a row's norm is 4 bytes more


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_keeps_as_many_bytes_as_the_page_says(name):
    config = TrainConfig(optimizer=name)  # pyright: ignore[reportArgumentType]
    parameter = torch.empty(1024, 1024, device="meta")
    kept = moments_of_a_part(parameter, config, 1)
    said = table("Moments")[name]
    assert sum(tensor.numel() * tensor.dtype.itemsize for tensor in kept) / parameter.numel() == pytest.approx(
        float(said["bytes"]), abs=0.005
    )
    assert NAMES[kept[0].dtype] == said["stored as"]


def test_the_page_has_a_row_for_every_setting_and_no_other():
    assert sorted(table("model.dtype")) == sorted(SETTINGS)
    assert sorted(table("model.ends")) == sorted(ENDS)
    assert list(table("Moments")) == list(OPTIMIZERS)
