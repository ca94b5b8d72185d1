"""docs/precision.md says what each setting stores and computes in; each cell of its tables is read off a model, not believed."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.config import TrainConfig
from burnish.model.network import DTYPES, head_of, hidden_states, packed
from burnish.plan.trace import worst_batch
from burnish.train.optimizer import OPTIMIZERS, build, moments_of_a_part
from burnish.train.scaler import START, begin
from tests.plan.test_trace import batch_of_lengths
from tests.tiny import a_plan, built_from, tiny_folder

PAGE = Path(__file__).parents[2] / "docs" / "precision.md"
NAMES = {kind: name for name, kind in DTYPES.items()} | {torch.uint8: "uint8"}


def table(after: str) -> dict[str, dict[str, str]]:
    """The first table after a heading: its first column → column → cell."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").partition(f"## {after}")[2].splitlines() if line.startswith("|")]
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[: _end(lines)]]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


def _end(lines: list[str]) -> int:
    """Where a second table begins: at its line of dashes, less its head."""
    dashes = [number for number, line in enumerate(lines) if re.fullmatch(r"[|\s:-]+", line)]
    return dashes[1] - 1 if len(dashes) > 1 else len(lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("precision") / "model", "qwen2", num_hidden_layers=1)


def measured(folder: Path, dtype: str) -> dict[str, str]:
    """One forward and backward pass, looked at where the table's columns say."""
    plan = a_plan(dtype=dtype)
    built, dense = built_from(folder, plan=plan), built_from(folder, {"format": "none"}, plan=plan)
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
    return {column: NAMES[kind] for column, kind in kinds.items()} | {"loss × at first": f"{begin(dtype, START, 0).scale:g}"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_setting_stores_and_computes_in_what_the_page_says(folder, dtype):
    said = {column.replace("`", ""): cell for column, cell in table("model.dtype")[dtype].items()}
    assert {column.replace("`", ""): cell for column, cell in measured(folder, dtype).items()} == said


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
    assert list(table("model.dtype")) == list(DTYPES)
    assert list(table("Moments")) == list(OPTIMIZERS)
