"""What the original saved is read with the meaning that it had there: logits equal those of its own formulas."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from burnish.adapt.disk import load_adapter, read_adapter_header
from burnish.compat.import_state import Trained, import_state
from burnish.compat.state import LAYOUTS, Layout, read_state
from burnish.config import ModelConfig
from burnish.errors import UserError
from burnish.load.pretrained import find_model
from burnish.load.weights import open_weights
from tests.tiny import built_from, tiny_folder

IDS = torch.arange(40).view(2, 20) * 7 % 320
LOGITS = {
    "rtol": 0,
    "atol": 1e-4,
}  # two orders of the same fp32 sums through a few layers; an update left out moves logits by more than 0.1
RANK = 4
SIX = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
BY_METHOD = {layout.train_types: layout for layout in LAYOUTS}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base"))


class Original(nn.Module):
    """The original's layer, by its formulas: base(x) + alpha / rank · B A x, or (base(x) + B A x) / ‖W + B A‖ · m."""

    def __init__(self, base: nn.Linear, parts: dict[str, Tensor], alpha: float) -> None:
        super().__init__()
        self.base, self.parts, self.alpha = base, parts, alpha

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.parts["a"], self.parts["b"]
        low = F.linear(F.linear(x, a), b)
        if "m" not in self.parts:
            return self.base(x) + self.alpha / a.shape[0] * low
        return (self.base(x) + low) / (self.base.weight + b @ a).norm(dim=1) * self.parts["m"]


def trained_parts(network: PreTrainedModel, layout: Layout, targets: tuple[str, ...] = SIX) -> dict[str, dict[str, Tensor]]:
    """Random trained values of each target layer, as bf16 holds them."""
    generator = torch.Generator().manual_seed(11)
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(targets):
            parts = {
                "a": torch.randn(RANK, module.in_features, generator=generator) * 0.2,
                "b": torch.randn(module.out_features, RANK, generator=generator) * 0.2,
                "m": module.weight.detach().norm(dim=1) * (1 + 0.2 * torch.rand(module.out_features, generator=generator)),
            }
            found[name] = {part: parts[part].bfloat16() for part in layout.parts}
    return found


def state_file(path: Path, parts: dict[str, dict[str, Tensor]], layout: Layout, more: dict[str, Tensor] | None = None) -> Path:
    """As the original names them."""
    root = "base_model.model." if layout.holds_base else ""
    values = {f"{root}{layer}.{layout.parts[part]}": value for layer, of in parts.items() for part, value in of.items()}
    save_file(values | (more or {}), path)
    return path


def original_network(
    folder: Path, parts: dict[str, dict[str, Tensor]], alpha: float, dense: dict[str, Tensor] | None = None
) -> PreTrainedModel:
    """transformers' own model with the original's layers in it, over `dense` weights where they are given."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in (dense or {}).items():
            network.get_submodule(name).weight.copy_(weight)
    for name, of in parts.items():
        network.set_submodule(name, Original(network.get_submodule(name), {part: value.float() for part, value in of.items()}, alpha))
    return network


def asked(base: Path, format_name: str = "none", **changes: Any) -> Trained:
    return Trained(ModelConfig(path=str(base), format=format_name), **changes)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("format_name", ["none", "nf4"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.train_types)
def test_an_imported_adapter_gives_the_logits_of_the_originals_formula(tmp_path: Path, base: Path, layout: Layout, format_name: str):
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    parts = trained_parts(plain, layout)
    more = {"base_model.model.model.norm.weight": torch.ones(128)} if layout.holds_base else None
    said = import_state(state_file(tmp_path / "s.safetensors", parts, layout, more), asked(base, format_name, alpha=12.0), tmp_path / "out")
    assert f"a {layout.method} adapter in PEFT's format, rank {RANK}" in said
    adapt = read_adapter_header(tmp_path / "out")["adapt"]
    built = built_from(base, {"format": format_name}, adapt)
    load_adapter(built.adapters, tmp_path / "out", open_weights(find_model(ModelConfig(path=str(base)))).fingerprint())
    dense = {name: torch.cat([tile.clone() for _, tile in layer.tiles()]) for name, layer in built.linears.items()}
    theirs = original_network(base, parts, 12.0, dense)
    with torch.no_grad():
        torch.testing.assert_close(built.model(IDS).logits, theirs(IDS).logits, **LOGITS)
        assert (plain(IDS).logits - theirs(IDS).logits).abs().max() > 0.1


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.train_types)
def test_peft_reads_what_was_imported(tmp_path: Path, base: Path, layout: Layout):
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    parts = trained_parts(plain, layout)
    import_state(state_file(tmp_path / "s.safetensors", parts, layout), asked(base), tmp_path / "out")
    theirs = original_network(base, parts, 16.0)
    ours = PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, **LOGITS)


def test_an_imported_adapter_says_what_it_belongs_to(tmp_path: Path, base: Path):
    layout = BY_METHOD["bnb_dora, hqq_dora"]
    file = state_file(tmp_path / "s.safetensors", trained_parts(AutoModelForCausalLM.from_pretrained(base), layout), layout)
    import_state(file, asked(base, "nf4", context=2048), tmp_path / "out")
    header = read_adapter_header(tmp_path / "out")
    assert (header["base"], header["format"], header["context"], header["dtype"]) == (str(base), "nf4", 2048, "bf16")
    assert (header["adapt"]["alpha"], header["adapt"]["rank"], header["adapt"]["dropout"]) == (RANK, RANK, 0.0)
    assert set(header["adapt"]["targets"]) == set(SIX)


def test_names_that_wrappers_left_in_the_keys_are_passed_over(tmp_path: Path, base: Path):
    layout = BY_METHOD["custom_lora, custom_qlora, hqq_lora"]
    parts = trained_parts(AutoModelForCausalLM.from_pretrained(base), layout)
    wrapped = {name.replace("self_attn.", "_checkpoint_wrapped_module.self_attn._fsdp_wrapped_module."): of for name, of in parts.items()}
    state = read_state(state_file(tmp_path / "s.safetensors", wrapped, layout))
    assert {layer for layer, _ in state.keys} == set(parts)


# --- blocks


def block_file(path: Path, base: Path, numbers: tuple[int, ...], silent: bool = False) -> dict[str, Tensor]:
    """Blocks like layer 1 of the base, changed; or silenced, as they begin."""
    weights = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    values = {}
    for number in numbers:
        for name, value in weights.items():
            if ".layers.1." in name:
                changed = value + torch.randn(value.shape, generator=generator) * 0.05
                if silent and ("o_proj" in name or "down_proj" in name):
                    changed = torch.zeros_like(value)
                values[name.replace("layers.1.", f"layers.{number}.")] = changed
    save_file(values, path)
    return values


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("deep"), num_hidden_layers=4)


def test_imported_blocks_stand_in_their_places(tmp_path: Path, deep: Path):
    values = block_file(tmp_path / "s.safetensors", deep, (2, 5))
    said = import_state(tmp_path / "s.safetensors", asked(deep), tmp_path / "out")
    assert "a model of 6 layers, of which 2, 5 are the trained blocks" in said
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(deep, dtype=torch.float32).eval()
    expected = base.state_dict()
    for new, old in ((5, None), (4, 3), (3, 2), (2, None), (1, 1), (0, 0)):
        for name, value in list(expected.items()):
            if old is not None and f"layers.{old}." in name:
                torch.testing.assert_close(ours.state_dict()[name.replace(f"layers.{old}.", f"layers.{new}.")], value, rtol=0, atol=0)
    for name, value in values.items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=0)
    with torch.no_grad():
        assert (ours(IDS).logits - base(IDS).logits).abs().max() > 0.1


def test_imported_blocks_that_are_silent_give_the_base(tmp_path: Path, deep: Path):
    block_file(tmp_path / "s.safetensors", deep, (2, 5), silent=True)
    import_state(tmp_path / "s.safetensors", asked(deep), tmp_path / "out")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(deep, dtype=torch.float32).eval()(IDS).logits
        torch.testing.assert_close(ours(IDS).logits, expected, **LOGITS)


def test_a_list_by_layer_grows_with_the_blocks(tmp_path: Path):
    folder = tiny_folder(tmp_path / "base", "gemma2", num_hidden_layers=4)
    block_file(tmp_path / "s.safetensors", folder, (2, 5))
    import_state(tmp_path / "s.safetensors", asked(folder), tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(folder).config.layer_types
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.layer_types
    assert len(set(before)) == 2
    assert after == [before[0], before[1], before[1], before[2], before[3], before[3]]


# --- what is refused


def lora_values(base: Path) -> dict[str, Tensor]:
    layout = BY_METHOD["custom_lora, custom_qlora, hqq_lora"]
    parts = trained_parts(AutoModelForCausalLM.from_pretrained(base), layout)
    return {f"{layer}.{layout.parts[part]}": value for layer, of in parts.items() for part, value in of.items()}


FIRST = "model.layers.0.self_attn.q_proj.lora_AB."


def test_an_unknown_layout_is_refused_with_the_known_ones(tmp_path: Path, base: Path):
    save_file({"transformer.h.0.attn.weight": torch.ones(2)}, tmp_path / "s.safetensors")
    with pytest.raises(
        UserError, match=r"its keys begin with transformer\.h\.0\.attn\.weight\. Known: .*lora_AB\.0\.weight.*dora_layer.*whole decoder"
    ):
        import_state(tmp_path / "s.safetensors", asked(base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values | {"model.norm.weight": torch.ones(128)}, r"it holds model\.norm\.weight beside what custom_lora"),
        (lambda values: {key: value for key, value in values.items() if key != f"{FIRST}1.weight"}, r"lacks .*q_proj\.lora_AB\.1\.weight"),
        (
            lambda values: values | {f"{FIRST}1.weight": torch.ones(64, RANK)},
            r"q_proj\.lora_AB\.1\.weight: \[64, 4\] in the file, \[128, 4\]",
        ),
        (lambda values: values | {f"{FIRST}0.weight": torch.ones(8, 128)}, r"several ranks \(4, 8\)"),
        (lambda values: values | {f"{FIRST}0.weight": torch.full((RANK, 128), float("nan"))}, r"not finite: that training had diverged"),
        (
            lambda values: values | {FIRST.replace("s.0", "s.7") + f"{at}.weight": torch.ones(RANK, RANK) for at in (0, 1)},
            r"model\.layers\.7\.self_attn\.q_proj\.lora_AB\.0\.weight: the model has no place for it",
        ),
        (
            lambda values: {key: value for key, value in values.items() if not key.startswith(FIRST)},
            r"model\.layers\.0\.self_attn\.q_proj: the file does not hold its a",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path: Path, base: Path, change, message):
    save_file(change(lora_values(base)), tmp_path / "s.safetensors")
    with pytest.raises(UserError, match=message):
        import_state(tmp_path / "s.safetensors", asked(base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dora_over_biases_is_refused_since_the_original_scaled_them(tmp_path: Path):
    folder, layout = tiny_folder(tmp_path / "base", "qwen2"), BY_METHOD["bnb_dora, hqq_dora"]
    file = state_file(tmp_path / "s.safetensors", trained_parts(AutoModelForCausalLM.from_pretrained(folder), layout), layout)
    with pytest.raises(UserError, match=r"scaled the bias of model\.layers\.0\.self_attn\.k_proj"):
        import_state(file, asked(folder), tmp_path / "out")


def test_a_whole_model_need_not_be_imported(tmp_path: Path, base: Path):
    with pytest.raises(UserError, match=r"holds a whole model, .* put it as model\.safetensors into a folder"):
        import_state(base / "model.safetensors", asked(base), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: {k: v for k, v in values.items() if "up_proj" not in k}, r"block 2 lacks mlp\.up_proj\.weight"),
        (lambda values: values | {"model.layers.2.extra": torch.ones(2)}, r"block 2 holds extra, which the base's layers lack"),
        (
            lambda values: values | {"model.layers.2.mlp.up_proj.weight": torch.ones(2, 2)},
            r"block 2: mlp\.up_proj\.weight is \[2, 2\], in the base",
        ),
        (lambda values: {k.replace("layers.2", "layers.9"): v for k, v in values.items()}, r"makes 5 layers, which have no block 9"),
    ],
)
def test_blocks_that_do_not_fit_are_refused_by_name(tmp_path: Path, deep: Path, change, message):
    save_file(change(block_file(tmp_path / "first.safetensors", deep, (2,))), tmp_path / "s.safetensors")
    with pytest.raises(UserError, match=message):
        import_state(tmp_path / "s.safetensors", asked(deep), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_stands_there_is_not_replaced(tmp_path: Path, base: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(UserError, match="stands there already"):
        import_state(tmp_path / "s.safetensors", asked(base), tmp_path / "out")


def test_a_file_that_is_missing_or_cut_short_is_refused(tmp_path: Path, base: Path):
    with pytest.raises(UserError, match=r"there is no such file\. The original wrote OUTPUT_DIR/model_state_dict\.safetensors"):
        read_state(tmp_path / "none.safetensors")
    save_file(lora_values(base), tmp_path / "s.safetensors")
    whole = (tmp_path / "s.safetensors").read_bytes()
    (tmp_path / "s.safetensors").write_bytes(whole[:-10])
    with pytest.raises(UserError, match="cut short"):
        read_state(tmp_path / "s.safetensors")
