"""Tiny random models, whole folders of them, and ours built from such a folder. What every test of a model starts from."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from burnish.config import AdaptConfig, ModelConfig, Plan, settings_of
from burnish.load.pretrained import find_model
from burnish.load.weights import open_weights
from burnish.parallel.world import World
from burnish.skeleton import Built, fill, skeleton

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
FAMILIES = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "mistral": transformers.MistralConfig,
    "gemma": transformers.GemmaConfig,
    "gemma2": transformers.Gemma2Config,
}
METHOD_SECTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({}, {}),
    "dora": ({}, {}),
    "full": ({"format": "none"}, {}),
    "expand": ({}, {"new_blocks": 1}),
}
"""What a method needs in the sections `model` and `adapt`, beside its name."""
ONE = World(0, 1, torch.device("cpu"), None)


def tiny_network(family: str = "llama", seed: int = 7, **changes: Any) -> PreTrainedModel:
    """A random transformers model in fp32 whose norms and biases are random too, so that a mix-up shows."""
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(FAMILIES[family](**(SIZES | changes)))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.normal_(std=0.2 if parameter.dim() > 1 else 0.1)
            if "norm" in name and family not in ("gemma", "gemma2"):
                parameter.add_(1)
    return network.eval()


def tiny_tokenizer(texts: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens with ChatML's two marks."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the ferry leaves the pier at dawn and the pier is closed at night", *texts] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>")


def tiny_folder(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A model folder as it would come from a hub: config, safetensors, tokenizer."""
    tiny_network(family, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def a_plan(**changes: Any) -> Plan:
    values = {
        "device": "cpu",
        "ranks": 1,
        "strategy": "single",
        "dtype": "fp32",
        "micro_batch": 1,
        "accumulation": 1,
        "checkpointing": False,
    }
    return Plan(**(values | changes))


def asked(path: Path | str, model: dict[str, Any] | None = None) -> ModelConfig:
    """A section `[model]` without a cache; its `format` may be a row of FORMATS (`hqq3`)."""
    given = dict(model or {})
    held = settings_of(given.pop("format")) if "format" in given else {}
    return ModelConfig(**({"path": str(path), "cache": False} | held | given))


def built_from(
    folder: Path, model: dict[str, Any] | None = None, adapt: dict[str, Any] | None = None, plan: Plan | None = None, world: World = ONE
) -> Built:
    """Our model, filled from the folder; `model` and `adapt` change their config sections."""
    section = asked(folder, model)
    adapting = AdaptConfig(**({"rank": 8, "alpha": 16.0} | (adapt or {})))
    found = find_model(section)
    infos = open_weights(found).infos if section.keeps_stored else None
    built = skeleton(found.config, section, adapting, plan or a_plan(), world, infos)
    fill(built, open_weights(found), section, adapting, world)
    return built


def with_method(folder: Path, method: str, model: dict[str, Any] | None = None, plan: Plan | None = None, **adapt: Any) -> Built:
    """Ours by one method, whatever settings that needs."""
    asked, adapting = METHOD_SECTIONS[method]
    return built_from(folder, {**(model or {}), **asked}, {"method": method, **adapting, **adapt}, plan)


def train_a_little(built: Built, seed: int = 3, size: float = 0.05) -> None:
    """Random values in what is trained, as if it had been, so that nothing is hidden by B = 0."""
    generator = torch.Generator().manual_seed(seed)

    def like(parameter: torch.Tensor, draw: Any) -> torch.Tensor:
        """Of a CPU's generator, whatever the device: the same numbers everywhere."""
        return draw(parameter.shape, generator=generator, dtype=parameter.dtype).to(parameter.device)

    with torch.no_grad():
        for adapter in built.adapters.by_name.values():
            for parameter in (adapter.a, adapter.b):
                parameter.add_(like(parameter, torch.randn) * size)
            if adapter.m is not None:
                adapter.m.mul_(1 + 0.2 * like(adapter.m, torch.rand))
        for whole in built.adapters.whole.values():
            whole.parameter.add_(like(whole.parameter, torch.randn) * size)
    built.adapters.switch.advance()
