"""Weights in a GGUF file: mapped to transformers' names, rows brought into its order, dequantized to fp32."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from gguf import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, get_tensor_name_map
from gguf.quants import dequantize
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from burnish.errors import UserError
from burnish.load.disk import read_bytes
from burnish.load.fingerprint import StoredTensor, fingerprint
from burnish.load.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from burnish.load.gguf_model import USE_SAFETENSORS, check_architecture
from burnish.load.weights import Stored, TensorInfo, check_rows

CHUNK = 1 << 20
"""Weights dequantized at a time: gguf's arithmetic takes several temporaries of their size."""

AS_THEY_ARE = {"Q4_0", "Q4_1", "Q8_0"}
"""Block types that are formats of ours, by their names in lower case."""

PLAIN = {"F64", "F32", "F16", "BF16"}

INTERLEAVED = {"llama"}
"""Architectures whose query and key rows llama.cpp interleaves: head by head, its row 2i + j is transformers' row j·half + i."""


@dataclass(frozen=True)
class _Source:
    """Where the rows of one parameter come from. `heads` is set where rows are interleaved within heads."""

    tensor: GgufTensor
    heads: int | None


@dataclass(frozen=True)
class GgufWeights:
    """`Weights` of one GGUF file. Holds its header; every read opens the file, reads, and closes it."""

    header: GgufHeader
    infos: dict[str, TensorInfo]
    sources: dict[str, _Source]
    processor: TensorProcessor

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        info, source = self.infos[name], self.sources[name]
        check_rows(name, info.shape, start, stop)
        rows = torch.empty((stop - start, *info.shape[1:]), dtype=torch.float32)
        step = max(1, CHUNK * info.shape[0] // max(1, torch.Size(info.shape).numel()))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            rows[first - start : last - start] = torch.from_numpy(self._dequantized(source, first, last))
        return rows

    def stored_rows(self, name: str, start: int, stop: int) -> dict[str, Tensor]:
        check_rows(name, self.infos[name].shape, start, stop)
        return {"blocks": torch.from_numpy(_stored_rows(self.header.path, self.sources[name], start, stop))}

    def fingerprint(self) -> str:
        return fingerprint(self._stored(name, source) for name, source in self.sources.items())

    def _dequantized(self, source: _Source, start: int, stop: int) -> NDArray[np.float32]:
        stored = _stored_rows(self.header.path, source, start, stop)
        plain = dequantize(stored, source.tensor.type).reshape(stop - start, *source.tensor.shape[1:])
        # what is left to do in the processors of these architectures is arithmetic by element (Gemma's norms)
        processed = plain if source.heads is not None else self.processor.process(plain, source.tensor.name).weights
        return np.ascontiguousarray(processed, dtype=np.float32)

    def _stored(self, name: str, source: _Source) -> StoredTensor:
        tensor, path = source.tensor, self.header.path
        kind = f"{self.header.architecture} {tensor.type.name} heads={source.heads}"
        return StoredTensor(name, tensor.shape, kind, tensor.bytes, lambda offset, count: read_bytes(path, tensor.offset + offset, count))


def open_gguf(path: Path, config: transformers.PretrainedConfig) -> GgufWeights:
    """Reads the header and maps its names; no weights are read. A tensor without a transformers name keeps its own."""
    header = read_gguf_header(path)
    check_architecture(header)
    # the table goes by the file's architecture, and its q/k processor does nothing, silently, without head counts
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=config.to_dict())
    names = _names(header, config)
    sources: dict[str, _Source] = {}
    for tensor in header.tensors.values():
        name = names.get(tensor.name, tensor.name)
        if name in sources:
            raise UserError(f"{path}: tensors {sources[name].tensor.name} and {tensor.name} are both {name}. {USE_SAFETENSORS}.")
        sources[name] = _Source(tensor, _interleaved_heads(header, config, tensor))
    _check_types(path, [source.tensor for source in sources.values()])
    infos = {name: _info(source.tensor) for name, source in sources.items()}
    return GgufWeights(header, infos, sources, processor)


def _info(tensor: GgufTensor) -> TensorInfo:
    kind = tensor.type.name
    stored = Stored(kind, kind.lower() if kind in AS_THEY_ARE else None, GGML_QUANT_SIZES[tensor.type][0])
    return TensorInfo(tensor.shape, torch.float32, tensor.bytes, None if kind in PLAIN else stored)


def _names(header: GgufHeader, config: transformers.PretrainedConfig) -> dict[str, str]:
    """GGUF's name of each tensor that the model has → transformers' name.

    What `get_gguf_hf_weights_map` gives for these architectures; that function builds its table of names anew for every module: 5 s.
    """
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == header.architecture)
    table = get_tensor_name_map(architecture, config.num_hidden_layers)
    names: dict[str, str] = {}
    for name in network.state_dict():
        stem, dot, suffix = name.rpartition(".")
        mapped = table.get_name(stem)
        if mapped is not None:
            names[mapped + dot + suffix] = name
    return names


def _interleaved_heads(header: GgufHeader, config: transformers.PretrainedConfig, tensor: GgufTensor) -> int | None:
    if header.architecture not in INTERLEAVED:
        return None
    if ".attn_q." in tensor.name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".attn_k." in tensor.name else None


def _check_types(path: Path, tensors: Iterable[GgufTensor]) -> None:
    """Refuses what the gguf package cannot dequantize now, not after hours of work."""
    for tensor in tensors:
        if len(tensor.shape) == 1 and GGML_QUANT_SIZES[tensor.type][0] > 1:
            raise UserError(
                f"{path}: tensor {tensor.name} is a vector of {tensor.type.name} blocks, which no converter writes. {USE_SAFETENSORS}."
            )
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[tensor.type][1]), dtype=np.uint8), tensor.type)
        except NotImplementedError:
            raise UserError(
                f"{path}: tensor {tensor.name} is of GGUF type {tensor.type.name}, which the gguf package cannot dequantize. "
                "Use a file of another type (Q8_0, Q6_K, Q4_K_M …) or the model's safetensors."
            ) from None


def _stored_rows(path: Path, source: _Source, start: int, stop: int) -> NDArray[np.uint8]:
    """The bytes of these rows of the parameter, [stop - start, bytes of a row]; of interleaved ones, those of their heads are read."""
    tensor = source.tensor
    wanted = np.arange(start, stop) if source.heads is None else interleaved_rows(tensor.shape[0], source.heads, start, stop)
    low, high = int(wanted.min()), int(wanted.max()) + 1
    content = read_bytes(path, tensor.offset + low * tensor.row_bytes, (high - low) * tensor.row_bytes)
    stored = np.frombuffer(content, dtype=np.uint8).reshape(high - low, tensor.row_bytes)
    return stored if source.heads is None else stored[wanted - low]


def interleaved_rows(rows: int, heads: int, start: int, stop: int) -> NDArray[np.int64]:
    """Which rows of the file are rows `start` to `stop` of the parameter: within a head, (j, i) is stored as (i, j), j < 2."""
    head_rows = rows // heads
    head, within = np.divmod(np.arange(start, stop), head_rows)
    j, i = np.divmod(within, head_rows // 2)
    return head * head_rows + 2 * i + j
