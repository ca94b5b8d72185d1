"""Tiny models on disk: a folder with safetensors, and GGUF files of several architectures."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
CONFIGS: dict[str, Callable[..., transformers.PretrainedConfig]] = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "gemma2": transformers.Gemma2Config,
    "gemma3": transformers.Gemma3TextConfig,
}
WRITABLE = [gguf.GGMLQuantizationType[name] for name in ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")]
HEAD_DIM = {"llama": 16, "qwen3": 128, "gemma2": 16, "gemma3": 16}  # transformers' own reading of Qwen3 knows no other than 128


def tiny_network(architecture: str, tied: bool = True) -> PreTrainedModel:
    """A random model whose norms and biases are random too, so that a mix-up shows."""
    torch.manual_seed(7)
    more = {"head_dim": HEAD_DIM[architecture]} if architecture in HEAD_DIM else {}
    network = AutoModelForCausalLM.from_config(CONFIGS[architecture](**SIZES, **more, tie_word_embeddings=tied))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.5)
    return network


def write_gguf(
    path: Path,
    architecture: str,
    network: PreTrainedModel,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: dict[str, np.ndarray] | None = None,
    metadata: dict[str, str] | None = None,
    kinds: dict[str, gguf.GGMLQuantizationType] | None = None,
) -> None:
    """Writes the network as llama.cpp's converter would: its names, interleaved q/k rows for llama, norms + 1 for Gemma.

    `extra` tensors of bytes are blocks of `kind` already; `kinds` gives tensors whose name holds a key another type.
    """
    config = network.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    if architecture in HEAD_DIM:
        writer.add_key_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
    _write_tokenizer(writer)
    for key, value in (metadata or {}).items():
        writer.add_string(key, value)
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
    )
    for name, parameter in network.named_parameters():
        stem, _, suffix = name.rpartition(".")
        values = _as_llama_cpp(architecture, config, name, parameter.detach().numpy())
        own = next((other for part, other in (kinds or {}).items() if part in name), kind)
        _add(writer, f"{names.get_name(stem)}.{suffix}", values, own)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values, raw_dtype=kind if values.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: gguf.GGMLQuantizationType) -> None:
    if values.ndim == 1 or kind not in WRITABLE:
        writer.add_tensor(name, np.ascontiguousarray(values))
    else:
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)


def _as_llama_cpp(architecture: str, config: Any, name: str, values: np.ndarray) -> np.ndarray:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if architecture == "llama" and heads is not None:  # convert_hf_to_gguf.py, `permute`
        return values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    return values + 1 if architecture.startswith("gemma") and name.endswith("norm.weight") else values


def _write_tokenizer(writer: gguf.GGUFWriter) -> None:
    backend = _trained_backend()
    vocabulary = sorted(backend.get_vocab(), key=backend.token_to_id)
    merges = [" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    tokens = vocabulary + [f"<unused{number}>" for number in range(SIZES["vocab_size"] - len(vocabulary))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)


def _trained_backend() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        ["the ferry leaves the harbour at dawn and the harbour is closed at night"] * 4,
        trainers.BpeTrainer(vocab_size=280, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet),
    )
    return backend


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=_trained_backend(), bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="session")
def network() -> PreTrainedModel:
    return tiny_network("llama")


@pytest.fixture(scope="session")
def _saved(tmp_path_factory: pytest.TempPathFactory, network: PreTrainedModel) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    network.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(_saved: Path, tmp_path: Path) -> Path:
    """A model's folder that the test may damage."""
    return Path(shutil.copytree(_saved, tmp_path / "tiny"))


@pytest.fixture
def shards(network: PreTrainedModel, folder: Path, tmp_path: Path) -> Path:
    """The same model in several shards with an index."""
    sharded = tmp_path / "shards"
    network.save_pretrained(sharded, max_shard_size="60KB")
    return sharded


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    return tiny_network


@pytest.fixture(scope="session")
def gguf_writer() -> Callable[..., None]:
    return write_gguf


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()
