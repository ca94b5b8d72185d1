"""The writer `gguf`: what llama.cpp serves, from a model that was trained on a GGUF file's own blocks.

model.gguf     the base's file again, each tensor by its name and in its type: d is in the fp16 scales of the blocks, codes are the file's.
               Where d is 1 (LoRA) every block has the file's own bytes.
adapter.gguf   the update as a LoRA of llama.cpp's, in fp32: A, and B' = s·d ⊙ B with alpha' = rank.

A block has no room for B A, so the update stays beside it. Training decoded with the very scales that are written.
"""

import struct
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from burnish.config import ExportConfig, ModelConfig
from burnish.errors import UserError
from burnish.export.card import gguf_card
from burnish.export.fold import Folded, fold_layer, gather
from burnish.export.merge import cast
from burnish.export.tuned import SMALL_FILES_BYTES, Advance, Prompts, Tuned, main_alone
from burnish.load.disk import read_bytes
from burnish.load.gguf_header import GgufHeader
from burnish.load.gguf_reader import GgufWeights, interleaved_rows
from burnish.load.pretrained import find_model
from burnish.load.weights import open_weights
from burnish.model.formats.gguf_blocks import KINDS, blocks_of
from burnish.parallel.world import barrier
from burnish.runs import write_whole

MODEL, ADAPTER = "model.gguf", "adapter.gguf"
TEMPLATE = "tokenizer.chat_template"
COPIED_BYTES = 64 << 20
DENSE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LowRank = dict[str, tuple[Tensor, Tensor]]


def bytes_needed(tuned: Tuned, config: ExportConfig) -> int:
    trained = sum(p.numel() * p.dtype.itemsize for p in tuned.built.adapters.trainable().values())
    return source_of(tuned).header.path.stat().st_size + trained + SMALL_FILES_BYTES


def write(tuned: Tuned, config: ExportConfig, folder: Path, prompts: Prompts, advance: Advance) -> dict[str, Any]:
    """The folder, whole or not at all; every rank must call it. Nothing is measured: blocks are written as they were trained on."""
    weights = source_of(tuned)
    with main_alone(folder) as temporary:
        low_rank = write_model(tuned, weights, None if temporary is None else temporary / MODEL, advance)
        if temporary is not None:
            _write_adapter(weights.header.architecture, low_rank, temporary / ADAPTER)
            advance((temporary / ADAPTER).stat().st_size)
            write_whole(temporary / "README.md", gguf_card(tuned))
    barrier()
    return {}


def source_of(tuned: Tuned) -> GgufWeights:
    """The file that the base was read from. A `UserError` where there is none, or where training changed its types."""
    about = tuned.about
    found = find_model(ModelConfig(path=about["base"], revision=about.get("revision")))
    if found.gguf is None or about["format"] != "stored":
        raise UserError(
            f"export.writers: gguf writes a GGUF file anew whose own blocks were trained on, and this run trained {about['base']} as "
            f"{about['format']}. Train with a .gguf file and model.format=stored; or export with the writer transformers, and convert that "
            "folder with llama.cpp's convert_hf_to_gguf.py."
        )
    if about.get("ends", "none") not in ("none", "stored"):
        raise UserError(
            f"export.writers: gguf writes the file's own embeddings, and this run trained on others (model.ends = {about['ends']!r}). "
            "Train with model.ends=stored or none; or export with the writer transformers."
        )
    weights = open_weights(found)
    assert isinstance(weights, GgufWeights)
    if weights.fingerprint() != about["fingerprint"]:
        raise UserError(f"{found.gguf} is not the file that was trained on: its content has changed since. Put that file back.")
    return weights


def write_model(tuned: Tuned, weights: GgufWeights, path: Path | None, advance: Advance) -> LowRank:
    """Writes the base's file with d folded in; every rank must call it, those without a `path` only give their rows.

    Returns A and B' of each adapted layer by its GGUF name, on the rank that writes. Costs one layer, and the adapters.
    """
    built, header = tuned.built, weights.header
    keys = {source.tensor.name: key for key, source in weights.sources.items()}
    low_rank: LowRank = {}
    with nullcontext() if path is None else path.open("wb") as file:
        start = 0 if file is None else file.write(header_bytes(header, _changed(tuned, header)))
        for tensor in sorted(header.tensors.values(), key=lambda tensor: tensor.offset):
            key = keys[tensor.name]
            name = key.removesuffix(".weight")
            layer = built.linears.get(name)
            folded = None if layer is None else fold_layer(gather(layer, built.adapters.by_name.get(name)))
            if file is None:
                continue
            file.seek(start + tensor.offset - header.layout.data)  # what is skipped is padding, and zero
            for piece in _content(tuned, weights, key, folded):
                advance(file.write(piece))
            if folded is not None and folded.a is not None and folded.b is not None:
                low_rank[tensor.name] = folded.a.float().cpu(), in_file_order(weights, key, folded.b.float().cpu())
        if file is not None:
            file.truncate(start + header.path.stat().st_size - header.layout.data)
    return low_rank


def _content(tuned: Tuned, weights: GgufWeights, key: str, folded: Folded | None) -> Iterator[bytes | bytearray]:
    """The bytes of one tensor as the file has them: of a linear layer from the model, of all else from the source."""
    tensor = weights.sources[key].tensor
    adapter = tuned.built.adapters.by_name.get(key.removesuffix(".weight"))
    plain = folded is not None and "weight" in folded.tensors
    if folded is None or (plain and (adapter is None or adapter.m is None)):
        for at in range(0, tensor.bytes, COPIED_BYTES):
            yield read_bytes(weights.header.path, tensor.offset + at, min(COPIED_BYTES, tensor.bytes - at))
        return
    kind = tensor.type.name
    rows = cast(key, folded.tensors["weight"], DENSE[kind]) if plain else _blocks(key, kind.lower(), folded)
    content: Any = in_file_order(weights, key, rows.cpu().contiguous()).view(torch.uint8)
    assert content.numel() == tensor.bytes, f"{key}: {content.numel()} bytes where {kind} takes {tensor.bytes}"
    yield content.numpy().tobytes()


def _blocks(name: str, kind: str, folded: Folded) -> Tensor:
    for scale in KINDS[kind].scales:
        if not folded.tensors[scale].isfinite().all():
            raise UserError(
                f"{name}: a scale times its row's gain is not finite in fp16, which GGUF's blocks hold. The training diverged: train again "
                "with a smaller train.lr."
            )
    return blocks_of(kind, folded.tensors)


def in_file_order(weights: GgufWeights, key: str, rows: Tensor) -> Tensor:
    """Rows of a parameter as the file orders them: llama.cpp interleaves those of query and key (see `gguf_reader`)."""
    heads = weights.sources[key].heads
    if heads is None:
        return rows
    ordered = torch.empty_like(rows)
    ordered[torch.from_numpy(interleaved_rows(len(rows), heads, 0, len(rows)))] = rows
    return ordered


def _changed(tuned: Tuned, header: GgufHeader) -> dict[str, str]:
    """The one thing of the metadata that training may change: the chat template, which servers take from the file."""
    jinja = tuned.template.jinja
    return {} if header.metadata.get(TEMPLATE) == jinja else {TEMPLATE: jinja}


def header_bytes(header: GgufHeader, changed: Mapping[str, str]) -> bytes:
    """The file's header up to its first tensor, with some texts of its metadata changed or added; unchanged where there are none."""
    layout = header.layout
    content = bytes(read_bytes(header.path, 0, layout.tensors[1]))
    texts = {key: _string(key) + struct.pack("<I", 8) + _string(text) for key, text in changed.items()}
    entries = {key: content[start:stop] for key, (start, stop) in layout.metadata.items()} | texts
    head = b"GGUF" + struct.pack("<IQQ", layout.version, len(header.tensors), len(entries))
    whole = head + b"".join(entries.values()) + content[slice(*layout.tensors)]
    return whole + bytes(-len(whole) % layout.alignment)


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _write_adapter(architecture: str, low_rank: LowRank, path: Path) -> None:
    """llama.cpp's LoRA file: `NAME.lora_a` [R, I] and `NAME.lora_b` [O, R], and an alpha that makes their scaling 1."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(next(iter(low_rank.values()))[0].shape[0]))
    for name, (a_RI, b_OR) in low_rank.items():
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a_RI.numpy()))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b_OR.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
