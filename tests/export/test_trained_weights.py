"""Models whose weights or new blocks were trained, exported: what `transformers` opens is what was trained."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from burnish.adapt.methods import METHODS
from burnish.config import ExportConfig
from burnish.errors import UserError
from burnish.export.card import MADE
from burnish.export.distance import log_probabilities
from burnish.export.writers import export
from tests.export.test_writers import FP32, IDS, PROMPTS, live, opened, tuned_from
from tests.tiny import tiny_folder

ADAPT = {"full": {}, "expand": {"new_blocks": 2}, "dora": {"also": ("embed_tokens", "norm")}}


def test_every_method_says_how_its_weights_came_about():
    assert MADE.keys() == METHODS.keys()


CELLS = [
    ("full", "llama", False),
    ("full", "gemma2", True),
    ("expand", "qwen2", False),
    ("expand", "gemma2", True),
    ("dora", "gemma", True),
    ("dora", "qwen2", False),
]


@pytest.mark.parametrize(("method", "family", "tied"), CELLS)
def test_a_folder_of_trained_weights_answers_as_the_live_model_does(tmp_path: Path, method: str, family: str, tied: bool):
    folder = tiny_folder(tmp_path / "base", family, tie_word_embeddings=tied)
    tuned = tuned_from(folder, "none" if method == "full" else "nf4", method=method, **ADAPT[method])
    report = export(tuned, FP32, tmp_path / "export", PROMPTS)
    theirs = opened(tmp_path / "export/transformers")
    assert theirs.config.num_hidden_layers == (4 if method == "expand" else 2)
    # law 6: the same sums in fp32
    torch.testing.assert_close(log_probabilities(theirs, IDS), live(tuned), rtol=0, atol=1e-4)
    assert report["transformers"]["distance"]["max"] < 1e-4
    card = (tmp_path / "export/transformers/README.md").read_text()
    assert f"- Method: {METHODS[method].title}" in card


def test_new_blocks_are_exported_as_they_were_trained_and_old_ones_dequantized(tmp_path: Path):
    folder = tiny_folder(tmp_path / "base")
    tuned = tuned_from(folder, "nf4", method="expand", new_blocks=1)
    export(tuned, FP32, tmp_path / "export")
    tensors, base = load_file(tmp_path / "export/transformers/model.safetensors"), load_file(folder / "model.safetensors")
    for name, parameter in tuned.built.adapters.trainable().items():
        assert torch.equal(tensors[name], parameter), name
    up = tensors["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(up, torch.cat([tile.clone() for _, tile in tuned.built.linears["model.layers.0.mlp.up_proj"].tiles()]))
    assert not torch.equal(up, base["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(tensors["model.layers.1.input_layernorm.weight"], base["model.layers.1.input_layernorm.weight"])


def test_full_masters_are_rounded_once_to_what_is_asked(tmp_path: Path):
    tuned = tuned_from(tiny_folder(tmp_path / "base"), "none", "bf16", method="full")
    export(tuned, ExportConfig(writers=("transformers",), dtype="bf16"), tmp_path / "export")
    tensors = load_file(tmp_path / "export/transformers/model.safetensors")
    for name, parameter in tuned.built.adapters.trainable().items():
        assert torch.equal(tensors[name], parameter.bfloat16()), name
    assert torch.equal(log_probabilities(opened(tmp_path / "export/transformers"), IDS), live(tuned))


@pytest.mark.parametrize("method", ["full", "expand"])
def test_the_peft_writer_refuses_what_has_no_adapters(tmp_path: Path, method: str):
    tuned = tuned_from(tiny_folder(tmp_path / "base"), "none", method=method, **ADAPT[method])
    with pytest.raises(UserError, match=rf"export.writers has 'peft'.*adapt.method = '{method}' has none\. Set export.writers="):
        export(tuned, ExportConfig(writers=("peft",)), tmp_path / "export")
    assert not list((tmp_path / "export").glob("*"))
