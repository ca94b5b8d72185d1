"""What the benchmarks of the layer compare is the same work on both sides, and what they count is there."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TOKENS = 8
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 16,
}


@pytest.fixture
def scripts(monkeypatch):
    """`layer` and `flops`, at a tiny shape."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = [file.stem for file in BENCHMARKS.glob("*.py")]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    layer, flops = importlib.import_module("layer"), importlib.import_module("flops")
    monkeypatch.setattr(layer, "LLAMA3_8B", SHAPE)
    yield layer, flops
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_both_sides_compute_the_same_layer(scripts, method):
    layer, _ = scripts
    ours, theirs = layer.our_layer(method, tokens=TOKENS), layer.their_layer(method == "dora", tokens=TOKENS)
    torch.testing.assert_close(ours(), theirs(), rtol=1e-5, atol=0)
    first, second = ours(), ours()
    assert second < first, "nothing is learned"


def test_the_weights_that_are_counted_are_those_of_the_layer(scripts, monkeypatch):
    layer, flops = scripts
    trained, layers = [], []
    monkeypatch.setattr(layer, "layer_step", lambda module, parameters, *_: layers.append(module) or trained.extend(parameters))
    work, _ = flops.of_a_layer("lora", TOKENS)
    assert work.adapter_weights == sum(parameter.numel() for parameter in trained)
    dense = [module for module in layer.dense_layer().modules() if isinstance(module, nn.Linear)]
    assert sorted(work.linears) == sorted((module.in_features, module.out_features) for module in dense)
    assert work.useful() == {
        "frozen": 4 * TOKENS * sum(module.weight.numel() for module in dense),
        "adapters": 6 * TOKENS * work.adapter_weights,
        "head": 0,
        "attention": 12 * TOKENS * (TOKENS + 1) / 2 * SHAPE["hidden_size"],
    }
