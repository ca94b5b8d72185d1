"""The laws of every cell of docs/support.md. Without BURNISH_SUPPORT=all: those of a cover, in which every two rows of the tables meet.
BURNISH_SUPPORT=rest: those that the record has no proof of.

One cell is one short training in float64 on gloo ranks. What it takes: the loss falls; what should be trained moves and nothing else
does; N ranks equal one; a run that is killed after a save in mid-epoch and continued equals the uninterrupted one bit for bit.
"""

import os
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from torch import nn

from burnish.adapt.expand import growth
from burnish.adapt.methods import METHODS
from burnish.model.network import decoder_layers, layers_name
from tests.load.conftest import tiny_network as network_for_gguf
from tests.load.conftest import write_gguf
from tests.ranks.cell_job import SAVED, STEPS, Found, run_cell, saves
from tests.ranks.cells import Cell, cover, runnable
from tests.ranks.jobs import fp_equal, make_tokens
from tests.ranks.record import failed, is_proven, proven
from tests.tiny import tiny_folder, tiny_network

pytestmark = pytest.mark.ranks
Q = gguf.GGMLQuantizationType
SMALL = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 1}
COVER = cover(runnable())
ASKED = {"all": runnable, "rest": lambda: [cell for cell in runnable() if not is_proven(cell)]}.get(os.environ.get("BURNISH_SUPPORT", ""))
CELLS = [
    pytest.param(cell, id=cell.name, marks=[] if cell in COVER else pytest.mark.support)
    for cell in sorted(ASKED() if ASKED else COVER, key=lambda cell: cell not in COVER)
]
Run = tuple[Found, Found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of one layer with biases, whose matrices three ranks cannot share evenly; and a file with blocks of several types."""
    root = tmp_path_factory.mktemp("support")
    tiny_folder(root / "model", "qwen2", **SMALL)
    kinds = {"q_proj": Q.Q8_0, "down_proj": Q.Q4_0, "o_proj": Q.F16}
    write_gguf(root / "model.gguf", "llama", network_for_gguf("llama"), Q.Q4_1, kinds=kinds)
    make_tokens(root / "tokens")
    make_tokens(root / "watched", samples=10)  # the first of them
    return root


@pytest.fixture(scope="module")
def alone(folder) -> Callable[[Cell], Run]:
    """One process's runs of a method and a format, each made once."""
    made: dict[tuple[str, str], Run] = {}

    def of(cell: Cell) -> Run:
        key = (cell.method, cell.format)
        if key not in made:
            made[key] = run_cell(str(folder), Cell(*key, "single"))
        return made[key]

    return of


@pytest.fixture(scope="module")
def on_ranks(folder, pool, alone) -> Callable[[Cell], list[Run]]:
    return lambda cell: [alone(cell)] if cell.ranks == 1 else pool.run(cell.ranks, run_cell, str(folder), cell)


def should_move(cell: Cell) -> set[str]:
    """By the table of methods and a plain transformers network, not by what our model says of itself."""
    method, net = METHODS[cell.method], network_for_gguf("llama") if cell.format == "stored" else tiny_network("qwen2", **SMALL)
    layers, prefix = decoder_layers(net), layers_name(net)
    if method.adapts:
        linears = [name for name, module in layers.named_modules() if isinstance(module, nn.Linear)]
        return {f"{prefix}.{name}.{part}" for name in linears for part in ("a", "b", *("m" for _ in range(bool(method.magnitude))))}
    if method.grows:
        new = growth(len(layers), cell.sections()[1].new_blocks).new
        return {f"{prefix}.{block}.{name}" for block in new for name, _ in layers[0].named_parameters()}
    return {name for name, _ in net.named_parameters()}


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_keeps_the_laws(cell, folder, alone, on_ranks):
    if ASKED:
        failed(cell)
    one, _ = alone(cell)
    runs = on_ranks(cell)

    moved = set().union(*(straight.moved for straight, _ in runs))
    assert moved == should_move(cell), "moved, or did not, against the table"
    assert moved == one.weights.keys()
    for straight, resumed in runs:
        assert straight.after < straight.before, "the loss did not fall"
        assert [record["step"] for record in straight.records] == list(range(1, STEPS + 1))
        as_one_rank(straight, one)
        assert resumed.records == straight.records, "not continued as it was left"
        assert resumed.after == straight.after
    same_saves(folder / "runs" / cell.name)
    if ASKED:
        proven(cell)


def as_one_rank(found: Found, one: Found) -> None:
    """In float64 to 1e-10, so that a wrong divisor or a lost micro-batch cannot hide."""
    for expected, record in zip(one.records, found.records, strict=True):
        for name in ("loss", "gradient_norm"):
            assert record[name] == pytest.approx(expected[name], rel=1e-10)
        assert (record["tokens"], record["supervised"]) == (expected["tokens"], expected["supervised"])
    assert (found.before, found.after) == (pytest.approx(one.before, rel=1e-10), pytest.approx(one.after, rel=1e-8))
    # Adam's first steps divide by a root of a square: a gradient of 1e-12 is as large as any other, so weights agree to 1e-8
    fp_equal(one.weights, found.weights, 1e-8, 1e-8)
    for name, tensor in one.frozen.items():
        assert torch.equal(tensor, found.frozen[name]), f"{name}: other bytes"


def same_saves(runs: Path) -> None:
    """Weights, moments and random states, byte for byte."""
    straight, resumed = saves(runs / "straight"), saves(runs / "resumed")
    assert [path.name for path in straight] == [path.name for path in resumed]
    assert straight[-1].name == f"step-{STEPS:06d}"
    assert straight[-2].name == f"step-{SAVED:06d}"
    for name in ("trainable", "moments", "random"):
        one, other = (path / f"{name}.safetensors" for path in (straight[-1], resumed[-1]))
        assert one.read_bytes() == other.read_bytes(), f"{name} of the last save"
