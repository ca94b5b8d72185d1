"""What a GGUF file says of its model beside the weights: the configuration. (Its tokenizer is `transformers`' own reading.)"""

from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.integrations.ggml import GGUF_CONFIG_DEFAULTS_MAPPING, GGUF_CONFIG_MAPPING

from burnish.errors import UserError
from burnish.load.gguf_header import GgufHeader

MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3_text"}
"""GGUF's names of the architectures that are read, and transformers'. Mistral's files say `llama`."""

UNMAPPED = {"qwen3": {"attention.key_length": "head_dim"}}
"""Settings that transformers' table lacks, and takes from its defaults instead."""

USE_SAFETENSORS = "Use the model's folder with safetensors instead (`model.path`)"


def gguf_config(header: GgufHeader) -> transformers.PretrainedConfig:
    """The configuration that `AutoConfig.from_pretrained(folder, gguf_file=…)` gives, from the header alone: that call takes 3 s.

    Refuses, naming it, what that function would leave out in silence and the model would then compute differently.
    """
    check_architecture(header)
    architecture = header.architecture
    values: dict[str, Any] = dict(GGUF_CONFIG_DEFAULTS_MAPPING.get(architecture, {}))
    values["tie_word_embeddings"] = "output.weight" not in header.tensors
    for key, value in header.metadata.items():
        section, _, setting = key.partition(".")
        name = (GGUF_CONFIG_MAPPING.get(section, {}) | UNMAPPED.get(section, {})).get(setting)
        if name not in (None, -1) and section in ("general", "tokenizer", architecture):
            values[name] = value
    values["model_type"] = MODEL_TYPES[architecture]
    if "vocab_size" not in values and "tokenizer.ggml.tokens" in header.metadata:
        values["vocab_size"] = len(header.metadata["tokenizer.ggml.tokens"])
    missing = sorted({"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"} - values.keys())
    if missing:
        raise UserError(
            f"{header.path} does not say its model's {', '.join(missing)}: it is damaged, or holds no language model. {USE_SAFETENSORS}."
        )
    try:
        config = AutoConfig.for_model(**values)
    except (StrictDataclassError, ValueError, TypeError, ZeroDivisionError) as problem:
        raise UserError(
            f"{header.path} describes a model that cannot be: {' '.join(str(problem).split())}. {USE_SAFETENSORS}."
        ) from problem
    config.name_or_path = str(header.path.parent)
    return config


def check_architecture(header: GgufHeader) -> None:
    """Raises a `UserError` for an architecture, or a variant of one, whose configuration a GGUF file cannot give us."""
    path, architecture, said = header.path, header.architecture, header.metadata
    if architecture not in MODEL_TYPES:
        raise UserError(
            f"{path} holds a model of architecture {architecture!r}; GGUF files of {', '.join(MODEL_TYPES)} are read. {USE_SAFETENSORS}."
        )
    scaling = said.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        raise UserError(
            f"{path} scales its rotary positions ({architecture}.rope.scaling.type = {scaling!r}), which transformers does not read "
            f"from a GGUF file: the model would compute something else. {USE_SAFETENSORS}."
        )
    if "rope_freqs.weight" in header.tensors:
        raise UserError(
            f"{path} scales its rotary positions by a tensor (rope_freqs.weight, as Llama 3.1 and later have), which transformers does not "
            f"read from a GGUF file: the model would compute something else. {USE_SAFETENSORS}."
        )
    # these two alone scale attention by hidden size over heads; no key of the file says so, and the default is another number
    if (architecture, said.get(f"{architecture}.block_count")) in (("gemma2", 46), ("gemma3", 62)):
        raise UserError(f"{path} is a Gemma of 27B, whose attention scale a GGUF file does not hold. {USE_SAFETENSORS}.")
