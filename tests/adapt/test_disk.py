"""An adapter on disk is what `peft` reads and what we read back; what does not belong together is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from burnish.adapt import disk
from burnish.adapt.attach import MAGNITUDE
from burnish.adapt.disk import load_adapter, peft_targets, read_adapter_header, save_adapter
from burnish.config import AdaptConfig
from burnish.errors import UserError
from burnish.model.formats import FORMATS
from burnish.skeleton import Built
from tests.layers import has_half_scales
from tests.tiny import FAMILIES, a_plan, built_from, tiny_folder, train_a_little

IDS = torch.arange(40).view(2, 20) * 7 % 320
BASE = "f" * 32
LOGITS = {"rtol": 0, "atol": 1e-4}  # two orders of the same fp32 sums through two layers; an update left out moves logits by more than 0.1


def about(format_name: str = "none", **changes: Any) -> dict[str, Any]:
    template = {"name": "alpaca", "jinja": "{{ messages }}", "system": None}
    said = {"base": "tiny", "fingerprint": BASE, "format": format_name, "block": 64, "dtype": "fp32", "template": template, "context": 256}
    return said | changes


def adapted(folder: Path, format_name: str = "none", train: bool = True, dtype: str = "fp32", **adapt: Any) -> tuple[Built, AdaptConfig]:
    built = built_from(folder, {"format": format_name}, adapt, a_plan(dtype=dtype))
    if train:
        train_a_little(built)
    return built, AdaptConfig(**({"rank": 8, "alpha": 16.0} | adapt))


def dense_base(built: Built, folder: Path) -> PreTrainedModel:
    """transformers' own model with our dequantized weights in it."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=built.model.dtype)
    with torch.no_grad():
        for name, layer in built.linears.items():
            network.get_submodule(name).weight.copy_(torch.cat([tile.clone() for _, tile in layer.tiles()]))
    return network.eval()


def values_of(built: Built) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in built.adapters.trainable().items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def saved(llama: Path, tmp_path: Path) -> Path:
    """A trained DoRA adapter on disk."""
    built, config = adapted(llama)
    save_adapter(built.adapters, config, tmp_path / "adapter", about())
    return tmp_path / "adapter"


@pytest.mark.parametrize("rank_stabilized", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without and with biases
@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("method", MAGNITUDE)
def test_peft_reads_what_was_trained(tmp_path: Path, method: str, format_name: str, family: str, rank_stabilized: bool):
    folder = tiny_folder(tmp_path / "base", family)
    dtype = "fp64" if has_half_scales(format_name) else "fp32"  # where d is not rounded into them
    built, config = adapted(folder, format_name, dtype=dtype, method=method, rank_stabilized=rank_stabilized)
    save_adapter(built.adapters, config, tmp_path / "adapter", about(format_name))
    theirs = PeftModel.from_pretrained(dense_base(built, folder), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(built.model(IDS).logits, theirs(IDS).logits, **LOGITS)
        assert (theirs(IDS).logits - dense_base(built, folder)(IDS).logits).abs().max() > 0.1


@pytest.mark.parametrize("method", MAGNITUDE)
def test_peft_writes_what_it_read_under_the_same_names(llama: Path, tmp_path: Path, method: str):
    built, config = adapted(llama, method=method)
    save_adapter(built.adapters, config, tmp_path / "ours", about())
    PeftModel.from_pretrained(dense_base(built, llama), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = load_file(tmp_path / "ours" / disk.TENSORS), load_file(tmp_path / "theirs" / disk.TENSORS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    said, known = (json.loads((tmp_path / whose / "adapter_config.json").read_text()) for whose in ("ours", "theirs"))
    said["target_modules"], known["target_modules"] = sorted(said["target_modules"]), sorted(known["target_modules"])
    # PEFT names the base by the folder that it was read from
    assert {key: known[key] for key in said if key != "base_model_name_or_path"} == {
        key: value for key, value in said.items() if key != "base_model_name_or_path"
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_adapts_our_layers_and_no_others(tmp_path: Path, family: str):
    folder = tiny_folder(tmp_path / "base", family)
    built, config = adapted(folder, targets=("q_proj", "down_proj"))
    save_adapter(built.adapters, config, tmp_path / "adapter", about())
    theirs = PeftModel.from_pretrained(dense_base(built, folder), tmp_path / "adapter")
    found = {name.removeprefix("base_model.model.") for name, module in theirs.named_modules() if hasattr(module, "lora_A")}
    assert found == set(built.adapters.by_name)
    with torch.no_grad():
        torch.testing.assert_close(built.model(IDS).logits, theirs.eval()(IDS).logits, **LOGITS)


@pytest.mark.parametrize("method", MAGNITUDE)
def test_what_is_read_back_is_bit_for_bit_what_was_saved(llama: Path, tmp_path: Path, method: str):
    built, config = adapted(llama, method=method)
    save_adapter(built.adapters, config, tmp_path / "adapter", about())
    fresh, _ = adapted(llama, train=False, method=method)
    with torch.no_grad():
        fresh.model(IDS)  # fills the cache of d, which loading must make stale
        header = load_adapter(fresh.adapters, tmp_path / "adapter", BASE)
        assert torch.equal(fresh.model(IDS).logits, built.model(IDS).logits)
    for name, value in values_of(built).items():
        assert torch.equal(values_of(fresh)[name], value), name
    assert header["base"] == "tiny"
    assert header["adapt"]["method"] == method
    assert header["template"]["jinja"] == "{{ messages }}"


def test_saving_again_replaces_the_whole_folder(llama: Path, saved: Path):
    (saved / "leftover.txt").write_text("of an older adapter")
    built, config = adapted(llama, method="lora")
    save_adapter(built.adapters, config, saved, about())
    assert sorted(file.name for file in saved.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "burnish.json"]
    assert not json.loads((saved / "adapter_config.json").read_text())["use_dora"]


def test_an_incomplete_about_is_caught_before_anything_is_written(llama: Path, tmp_path: Path):
    built, config = adapted(llama)
    with pytest.raises(AssertionError, match="fingerprint"):
        save_adapter(built.adapters, config, tmp_path / "adapter", {"base": "tiny"})
    assert not (tmp_path / "adapter").exists()


# --- targets

DECODER = [f"model.layers.{layer}.{name}" for layer in range(12) for name in ("self_attn.q_proj", "mlp.down_proj")]


def test_targets_are_plain_names_where_those_find_the_adapted_layers_alone():
    assert peft_targets(DECODER, [*DECODER, "model.embed_tokens", "lm_head"]) == ["down_proj", "q_proj"]


def test_a_layer_of_the_same_name_outside_the_decoder_is_not_adapted_by_peft():
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    others = ["model.encoder.q_proj", "q_proj", "xmodel.layers.3.self_attn.q_proj", "model.layers.3.self_attn.q_proj.q_proj"]
    targets = peft_targets(DECODER, [*DECODER, *others])
    found = [name for name in [*DECODER, *others] if check_target_module_exists(LoraConfig(target_modules=targets), name)]
    assert found == DECODER


def test_whole_names_are_given_where_a_pattern_over_all_layers_finds_too_much():
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    adapted_names = DECODER[:4]
    targets = peft_targets(adapted_names, DECODER)
    assert [name for name in DECODER if check_target_module_exists(LoraConfig(target_modules=targets), name)] == adapted_names


# --- refusals


def refusal(llama: Path, folder: Path, fingerprint: str = BASE, **adapt: Any) -> str:
    """The message of a refused load; no value may have changed, nor the clock."""
    built, _ = adapted(llama, train=False, **adapt)
    before, step = values_of(built), built.adapters.switch.step
    with pytest.raises(UserError) as caught:
        load_adapter(built.adapters, folder, fingerprint)
    assert all(torch.equal(values_of(built)[name], value) for name, value in before.items())
    assert built.adapters.switch.step == step
    return str(caught.value)


def test_an_adapter_of_another_base_is_refused_with_both_fingerprints(llama: Path, saved: Path):
    message = refusal(llama, saved, "0" * 32)
    assert BASE in message
    assert "0" * 32 in message
    assert "tiny" in message


@pytest.mark.parametrize(
    ("adapt", "said"),
    [
        ({"method": "lora"}, "adapt.method: 'dora' in the adapter, 'lora' here"),
        ({"rank": 4, "alpha": 8.0}, "adapt.rank: 8 in the adapter, 4 here"),
        ({"alpha": 32.0}, "scaling: 2.0 in the adapter, 4.0 here"),
        ({"rank_stabilized": True}, "scaling: 2.0 in the adapter, 5.65"),
        ({"targets": ("q_proj", "up_proj")}, "adapted there alone: down_proj, gate_proj, k_proj, o_proj, v_proj"),
        ({"format_name": "nf4"}, "model.format: 'none' in the adapter, 'nf4' here"),
    ],
)
def test_an_adapter_made_with_other_settings_is_refused_naming_them(llama: Path, saved: Path, adapt: dict[str, Any], said: str):
    assert said in refusal(llama, saved, **adapt)


def test_another_block_is_refused_where_the_format_has_blocks(llama: Path, tmp_path: Path):
    built, config = adapted(llama, "nf4")
    save_adapter(built.adapters, config, tmp_path / "adapter", about("nf4", block=32))
    assert "model.block: 32 in the adapter, 64 here" in refusal(llama, tmp_path / "adapter", format_name="nf4")


LAYER = "base_model.model.model.layers.1.mlp.up_proj"


def _lost(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{LAYER}.lora_B.weight"]


def _extra(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.lora_E"] = torch.zeros(3)


def _another_shape(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.lora_magnitude_vector"] = torch.zeros(7)


CHANGES: list[tuple[Callable[[dict[str, Tensor]], None], str]] = [
    (_lost, f"{LAYER}.lora_B.weight: the file does not hold it"),
    (_extra, f"{LAYER}.lora_E: the model has no place for it"),
    (_another_shape, f"{LAYER}.lora_magnitude_vector: [7] in the file, [192] in the model"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_a_tensor_too_few_too_many_or_of_another_shape_is_named(llama: Path, saved: Path, change: Callable[..., None], said: str):
    tensors = load_file(saved / disk.TENSORS)
    change(tensors)
    save_file(tensors, saved / disk.TENSORS)
    assert said in refusal(llama, saved)


@pytest.mark.parametrize("kept", [0, 5, 500, 0.5, -1])
def test_a_truncated_file_is_refused(llama: Path, saved: Path, kept: float):
    content = (saved / disk.TENSORS).read_bytes()
    (saved / disk.TENSORS).write_bytes(content[: int(len(content) * kept) if kept == 0.5 else int(kept)])
    assert "cut short or damaged" in refusal(llama, saved)


def test_a_folder_without_its_tensors_is_refused(llama: Path, saved: Path):
    (saved / disk.TENSORS).unlink()
    assert "holds no adapter_model.safetensors" in refusal(llama, saved)


def test_an_adapter_of_a_newer_burnish_is_refused(llama: Path, saved: Path):
    header = read_adapter_header(saved)
    (saved / "burnish.json").write_text(json.dumps(header | {"burnish": "adapter/2"}))
    assert "newer burnish" in refusal(llama, saved)


def test_a_header_that_lacks_something_is_refused(llama: Path, saved: Path):
    header = read_adapter_header(saved)
    (saved / "burnish.json").write_text(json.dumps({key: value for key, value in header.items() if key != "fingerprint"}))
    assert "does not say the adapter's fingerprint" in refusal(llama, saved)


def test_a_header_with_a_damaged_section_is_refused(llama: Path, saved: Path):
    header = read_adapter_header(saved)
    (saved / "burnish.json").write_text(json.dumps(header | {"adapt": {"rank": -1}}))
    assert "section adapt is damaged" in refusal(llama, saved)


def test_an_adapter_that_only_peft_wrote_is_refused_since_nothing_says_its_base(saved: Path, tmp_path: Path):
    (saved / "burnish.json").unlink()
    with pytest.raises(UserError, match="burnish did not write"):
        read_adapter_header(saved)
    shutil.rmtree(saved)
    with pytest.raises(UserError, match="holds no adapter"):
        read_adapter_header(saved)
