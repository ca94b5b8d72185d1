"""What was trained, on disk, by every method; and what is trained beside adapters, as `peft` reads it."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from burnish.adapt import disk
from burnish.adapt.disk import load_adapter, save_adapter, tensors_file
from burnish.adapt.methods import METHODS
from burnish.config import AdaptConfig
from burnish.errors import UserError
from burnish.skeleton import Built
from tests.adapt.test_disk import BASE, IDS, LOGITS, about
from tests.tiny import METHOD_SECTIONS, tiny_folder, train_a_little, with_method

FORMAT = {name: "none" if METHODS[name].formats else "nf4" for name in METHODS}


def section(method: str, **adapt: Any) -> AdaptConfig:
    return AdaptConfig(**({"rank": 8, "alpha": 16.0, "method": method} | METHOD_SECTIONS[method][1] | adapt))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("llama"))


def saved(folder: Path, at: Path, method: str, **adapt: Any) -> Built:
    built = with_method(folder, method, **adapt)
    train_a_little(built)
    save_adapter(built.adapters, section(method, **adapt), at, about(FORMAT[method]), [name for name, _ in built.model.named_modules()])
    return built


@pytest.mark.parametrize("method", METHODS)
def test_what_any_method_saved_is_read_back_bit_for_bit(llama: Path, tmp_path: Path, method: str):
    built = saved(llama, tmp_path / "saved", method)
    fresh = with_method(llama, method)
    assert not torch.equal(logits(fresh.model), logits(built.model))
    header = load_adapter(fresh.adapters, tmp_path / "saved", BASE)
    assert header["adapt"]["method"] == method
    assert torch.equal(logits(fresh.model), logits(built.model))
    found = tensors_file(tmp_path / "saved")
    assert found is not None
    assert found.name == ("adapter_model.safetensors" if METHODS[method].adapts else "trained.safetensors")
    assert (tmp_path / "saved/adapter_config.json").exists() == METHODS[method].adapts


@pytest.mark.parametrize("method", ["full", "expand"])
def test_trained_weights_lie_under_the_models_own_names_in_fp32(llama: Path, tmp_path: Path, method: str):
    built = saved(llama, tmp_path, method)
    tensors = load_file(tmp_path / "trained.safetensors")
    assert tensors.keys() == built.adapters.trainable().keys()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize(("theirs", "ours"), [("full", "dora"), ("expand", "full"), ("dora", "expand")])
def test_what_another_method_saved_is_refused_by_name(llama: Path, tmp_path: Path, theirs: str, ours: str):
    saved(llama, tmp_path / "saved", theirs)
    with pytest.raises(UserError, match=f"adapt.method: '{theirs}' in the adapter, '{ours}' here"):
        load_adapter(with_method(llama, ours).adapters, tmp_path / "saved", BASE)


def test_blocks_of_another_number_are_refused(llama: Path, tmp_path: Path):
    saved(llama, tmp_path / "saved", "expand")
    with pytest.raises(UserError, match=r"model.layers.1.mlp.down_proj.weight: the file does not hold it"):
        load_adapter(with_method(llama, "expand", new_blocks=2).adapters, tmp_path / "saved", BASE)


def test_trained_weights_on_another_base_are_refused(llama: Path, tmp_path: Path):
    saved(llama, tmp_path / "saved", "expand")
    with pytest.raises(UserError, match="was trained on another base"):
        load_adapter(with_method(llama, "expand").adapters, tmp_path / "saved", "0" * 32)


def test_a_lost_file_of_trained_weights_is_named(llama: Path, tmp_path: Path):
    saved(llama, tmp_path / "saved", "expand")
    (tmp_path / "saved/trained.safetensors").unlink()
    assert tensors_file(tmp_path / "saved") is None
    with pytest.raises(UserError, match=r"holds no trained\.safetensors"):
        load_adapter(with_method(llama, "expand").adapters, tmp_path / "saved", BASE)


# --- beside adapters

ALSO = [
    ("lora", "llama", False, ("embed_tokens", "lm_head", "norm")),
    ("dora", "llama", True, ("embed_tokens",)),
    ("dora", "gemma2", True, ("lm_head", "layers.1.*norm")),
    ("lora", "qwen2", False, ("lm_head",)),
]


@pytest.mark.parametrize(("method", "family", "tied", "also"), ALSO)
def test_peft_reads_what_was_trained_beside_adapters(tmp_path: Path, method: str, family: str, tied: bool, also: tuple[str, ...]):
    folder = tiny_folder(tmp_path / "base", family, tie_word_embeddings=tied)
    built = saved(folder, tmp_path / "adapter", method, also=also)
    assert ("model.embed_tokens.weight" in built.adapters.trainable()) == ("embed_tokens" in also or tied)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ties: both sides are in the file, with one value
        network = _network(built, folder)
        base = logits(network)
        theirs = PeftModel.from_pretrained(network, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(built.model), logits(theirs), **LOGITS)
    with theirs.disable_adapter():
        assert torch.equal(logits(theirs), base)
    assert (logits(theirs) - base).abs().max() > 0.1


def _network(built: Built, folder: Path) -> Any:
    """transformers' model with the base's own values where ours were trained, and the dequantized ones elsewhere."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, layer in built.linears.items():
            network.get_submodule(name).weight.copy_(torch.cat([tile.clone() for _, tile in layer.tiles()]))
    return network.eval()


def test_both_sides_of_a_tie_are_written_with_one_value(tmp_path: Path):
    folder = tiny_folder(tmp_path / "base", tie_word_embeddings=True)
    saved(folder, tmp_path / "adapter", "lora", also=("embed_tokens",))
    tensors = load_file(tmp_path / "adapter" / disk.TENSORS)
    assert torch.equal(tensors["base_model.model.model.embed_tokens.weight"], tensors["base_model.model.lm_head.weight"])
    assert json.loads((tmp_path / "adapter" / disk.SETTINGS).read_text())["modules_to_save"] == ["lm_head", "model.embed_tokens"]


def test_what_was_trained_beside_adapters_is_read_back_by_us(llama: Path, tmp_path: Path):
    built = saved(llama, tmp_path / "adapter", "dora", also=("norm", "embed_tokens"))
    fresh = with_method(llama, "dora", also=("norm", "embed_tokens"))
    load_adapter(fresh.adapters, tmp_path / "adapter", BASE)
    assert torch.equal(logits(fresh.model), logits(built.model))
    with pytest.raises(UserError, match=r"model\.norm\.weight: the model has no place for it"):
        load_adapter(with_method(llama, "dora").adapters, tmp_path / "adapter", BASE)


def test_a_lost_tensor_beside_adapters_is_named(llama: Path, tmp_path: Path):
    saved(llama, tmp_path / "adapter", "lora", also=("norm",))
    tensors = load_file(tmp_path / "adapter" / disk.TENSORS)
    del tensors["base_model.model.model.norm.weight"]
    save_file(tensors, tmp_path / "adapter" / disk.TENSORS)
    with pytest.raises(UserError, match=r"base_model.model.model.norm.weight: the file does not hold it"):
        load_adapter(with_method(llama, "lora", also=("norm",)).adapters, tmp_path / "adapter", BASE)
