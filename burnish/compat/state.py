"""What a `model_state_dict.safetensors` of the original holds, told by its keys. A new layout is one row in LAYOUTS.

model.layers.0.self_attn.q_proj.lora_AB.0.weight [R, I], .lora_AB.1.weight [O, R]        custom_lora, custom_qlora, hqq_lora
model.layers.0.self_attn.q_proj.dora_layer.lora_A.weight [R, I], .dora_layer.lora_B.weight [O, R], .magnitude_layer.magnitude [O]
                                                                                            bnb_dora, hqq_dora
model.layers.10.self_attn.q_proj.weight …: whole decoder layers                             bnb_llama_pro, hqq_llama_pro
base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight …, and the base      lora, qlora (PEFT's)
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from burnish.errors import UserError
from burnish.load.safetensors_reader import read_header

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_offload_wrapped_module.")
"""Names that torch's wrappers put between others; some versions left them in the keys."""
PEFT_ROOT = "base_model.model."
LAYER = re.compile(r"^(.*\blayers\.)(\d+)\.(.+)$")


@dataclass(frozen=True)
class Layout:
    """One kind of file: the method that was trained, and which end of a key is which part of an adapter."""

    train_types: str
    method: Literal["lora", "dora"]
    parts: dict[str, str]
    holds_base: bool = False
    """Whether base weights lie beside the adapter's, to be passed over."""


LAYOUTS = (
    Layout("custom_lora, custom_qlora, hqq_lora", "lora", {"a": "lora_AB.0.weight", "b": "lora_AB.1.weight"}),
    Layout(
        "bnb_dora, hqq_dora",
        "dora",
        {"a": "dora_layer.lora_A.weight", "b": "dora_layer.lora_B.weight", "m": "magnitude_layer.magnitude"},
    ),
    Layout("lora, qlora", "lora", {"a": "lora_A.default.weight", "b": "lora_B.default.weight"}, holds_base=True),
)


@dataclass(frozen=True)
class State:
    """A file that was recognized. `keys` are its own by what they stand for: (layer, part), or (number of the block, rest of the name)."""

    file: Path
    layout: Layout | None
    """None for whole decoder layers."""
    keys: dict[tuple[str, str], str]
    shapes: dict[str, tuple[int, ...]]

    def tensor(self, layer: str, part: str) -> Tensor:
        """The stored tensor. Raises a `UserError` where it holds a value that is not finite."""
        key = self.keys[layer, part]
        try:
            with safe_open(self.file, framework="pt") as opened:
                value: Tensor = opened.get_tensor(key)
        except SafetensorError as problem:
            raise UserError(f"{self.file} is cut short or damaged ({problem}). Copy it again.") from None
        if not torch.isfinite(value).all():
            raise UserError(f"{self.file}: {key} holds values that are not finite: that training had diverged, and is of no use.")
        return value


def read_state(file: Path) -> State:
    """Recognizes a file by its keys; reads its header alone. Raises a `UserError` for a layout that is not known, naming those that are."""
    if not file.is_file():
        raise UserError(f"{file}: there is no such file. The original wrote OUTPUT_DIR/model_state_dict.safetensors.")
    shapes = {key: info.shape for key, (info, _) in read_header(file).items()}
    plain = {key: _plain(key) for key in shapes}
    for layout in LAYOUTS:
        keys = {found: key for key, name in plain.items() if (found := _part(name, layout)) is not None}
        if keys:
            others = sorted(shapes.keys() - keys.values())
            if others and not layout.holds_base:
                raise _unknown(file, f"it holds {others[0]} beside what {layout.train_types} save")
            _check_complete(file, layout, keys)
            return State(file, layout, keys, shapes)
    numbered = {(found[2], found[3]): key for key, name in plain.items() if (found := LAYER.match(name)) is not None}
    if numbered and len(numbered) == len(shapes):
        return State(file, None, numbered, shapes)
    if numbered:
        raise UserError(
            f"{file} holds a whole model, as the train type full saves it. Nothing need be imported: put "
            "it as model.safetensors into a folder with the base's config.json and tokenizer, and give that folder as model.path."
        )
    raise _unknown(file, f"its keys begin with {', '.join(sorted(shapes)[:3])}" if shapes else "it holds no tensor")


def _plain(key: str) -> str:
    for wrapper in WRAPPERS:
        key = key.replace(wrapper, "")
    return key.removeprefix(PEFT_ROOT)


def _part(name: str, layout: Layout) -> tuple[str, str] | None:
    """(layer, part) of a key without wrappers."""
    for part, end in layout.parts.items():
        if name.endswith("." + end):
            return name.removesuffix("." + end), part
    return None


def _check_complete(file: Path, layout: Layout, keys: dict[tuple[str, str], str]) -> None:
    layers = {layer for layer, _ in keys}
    missing = sorted(f"{layer}.{end}" for layer in layers for part, end in layout.parts.items() if (layer, part) not in keys)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{file} lacks {missing[0]}{more}: it is incomplete. Copy it again.")


def _unknown(file: Path, what: str) -> UserError:
    known = "; ".join(f"{layout.train_types}: {', '.join(layout.parts.values())}" for layout in LAYOUTS)
    return UserError(
        f"{file} is no saved state of the original that is known: {what}. Known: {known}; "
        "bnb_llama_pro, hqq_llama_pro: whole decoder layers."
    )
