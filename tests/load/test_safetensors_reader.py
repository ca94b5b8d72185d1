"""Every tensor is read as the safetensors library reads it; every contradiction between files is named."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import PreTrainedModel

from burnish.errors import UserError
from burnish.load.safetensors_reader import INDEX, open_safetensors
from burnish.load.weights import TensorInfo


def index_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def write_index(folder: Path, index: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))


def test_rows_equal_the_slices_that_the_library_gives(folder: Path, network: PreTrainedModel) -> None:
    weights, state = open_safetensors(folder), network.state_dict()
    for name, info in weights.infos.items():
        assert info.shape == tuple(state[name].shape)
        assert info.dtype == state[name].dtype
        count = info.shape[0]
        for start, stop in [(0, count), (0, 0), (count - 1, count), (count // 3, count // 2)]:
            assert torch.equal(weights.rows(name, start, stop), state[name][start:stop]), (name, start, stop)
    assert set(weights.infos) == set(state) - {"lm_head.weight"}


STORABLE = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool),
]


@pytest.mark.parametrize("dtype", STORABLE, ids=str)
def test_a_tensor_of_any_dtype_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    stored = torch.randint(0, 2 if dtype is torch.bool else 256, (6, 40), dtype=torch.uint8).view(dtype)
    scalar = stored[0, 0].clone()
    safetensors.torch.save_file({"matrix": stored, "scalar": scalar, "empty": stored[:0].clone()}, tmp_path / "model.safetensors")
    weights = open_safetensors(tmp_path)
    assert weights.infos["matrix"] == TensorInfo(tuple(stored.shape), dtype, 240)
    assert torch.equal(weights.rows("matrix", 2, 5).view(torch.uint8), stored[2:5].view(torch.uint8))
    assert torch.equal(weights.rows("scalar", 0, 1).view(1).view(torch.uint8), scalar.view(1).view(torch.uint8))
    assert weights.rows("empty", 0, 0).shape == stored[:0].shape


def test_shards_hold_what_one_file_holds(folder: Path, shards: Path) -> None:
    one, many = open_safetensors(folder), open_safetensors(shards)
    assert len(set(index_of(shards).values())) > 2
    assert one.infos == many.infos
    assert all(torch.equal(one.rows(name, 0, info.shape[0]), many.rows(name, 0, info.shape[0])) for name, info in one.infos.items())


def test_a_file_that_was_cut_short_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for length, message in [
        (len(content) - 1, "is cut short: its tensors take"),
        (100, "its header alone takes"),
        (4, "no readable header"),
    ]:
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=rf"model.safetensors.*{message}.*again"):
            open_safetensors(folder)


def test_a_file_that_shrinks_while_it_is_read_is_named(folder: Path) -> None:
    weights = open_safetensors(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    last = max(weights.places, key=lambda name: weights.places[name].offset)
    with pytest.raises(UserError, match=r"ends at byte .*, in the middle of a tensor"):
        weights.rows(last, 0, weights.infos[last].shape[0])


def test_a_git_lfs_pointer_is_recognized(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n")
    with pytest.raises(UserError, match=r"git lfs pull"):
        open_safetensors(folder)


def test_a_damaged_header_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:12] = b"nope"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"header is damaged"):
        open_safetensors(folder)


def test_an_unknown_dtype_is_named(folder: Path) -> None:
    header = json.dumps({"x": {"dtype": "F4_E2M1", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    with pytest.raises(UserError, match=r"tensor x has dtype F4_E2M1"):
        open_safetensors(folder)


def test_a_tensor_whose_bytes_do_not_fit_its_shape_is_named(folder: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0000")
    with pytest.raises(UserError, match=r"takes 8 bytes, but its header gives it 4"):
        open_safetensors(folder)


def test_a_missing_shard_is_named(shards: Path) -> None:
    missing = sorted(set(index_of(shards).values()))[1]
    (shards / missing).unlink()
    with pytest.raises(UserError, match=rf"lacks {missing}.*download is incomplete"):
        open_safetensors(shards)


def test_a_tensor_that_its_shard_does_not_hold_is_named(shards: Path) -> None:
    index = index_of(shards)
    write_index(shards, index | {"model.invented.weight": next(iter(index.values()))})
    with pytest.raises(UserError, match=r"holds tensor model.invented.weight, but it does not"):
        open_safetensors(shards)


def test_a_tensor_in_another_shard_than_the_index_says_is_named(shards: Path) -> None:
    index = index_of(shards)
    shared = [name for name, file in index.items() if list(index.values()).count(file) > 1]
    name, other = next((name, other) for name in shared for other in index.values() if other != index[name])
    write_index(shards, index | {name: other})
    with pytest.raises(UserError, match=rf"{name} lies in {other}, but it lies in"):
        open_safetensors(shards)


def test_a_tensor_that_two_shards_hold_is_named(shards: Path) -> None:
    first, second = sorted(set(index_of(shards).values()))[:2]
    tensors = safetensors.torch.load_file(shards / first)
    safetensors.torch.save_file(safetensors.torch.load_file(shards / second) | tensors, shards / second)
    with pytest.raises(UserError, match=rf"lies both in {first} and in {second}"):
        open_safetensors(shards)


def test_a_tensor_that_the_index_does_not_name_is_reported(shards: Path) -> None:
    index = index_of(shards)
    name = next(name for name, file in index.items() if list(index.values()).count(file) > 1)
    del index[name]
    write_index(shards, index)
    with pytest.raises(UserError, match=rf"holds tensor {name}, which {INDEX} does not name"):
        open_safetensors(shards)


def test_an_index_that_points_out_of_its_folder_is_refused(shards: Path) -> None:
    write_index(shards, dict.fromkeys(index_of(shards), "../secret.safetensors"))
    with pytest.raises(UserError, match=r"not a file of its own folder"):
        open_safetensors(shards)


def test_a_damaged_index_is_named(shards: Path) -> None:
    (shards / INDEX).write_text("{")
    with pytest.raises(UserError, match=rf"{INDEX} is damaged"):
        open_safetensors(shards)


def test_several_files_without_an_index_are_refused(shards: Path) -> None:
    (shards / INDEX).unlink()
    with pytest.raises(UserError, match=r"safetensors files and no model.safetensors.index.json"):
        open_safetensors(shards)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no safetensors file. Is the download complete"):
        open_safetensors(tmp_path)


def test_reading_a_few_rows_takes_memory_for_those_rows_alone(tmp_path: Path) -> None:
    safetensors.torch.save_file({"large": torch.zeros(65536, 512)}, tmp_path / "model.safetensors")
    weights = open_safetensors(tmp_path)
    anonymous, mapped = resident_kib("RssAnon"), resident_kib("RssFile")
    for start in range(0, 65536, 4096):
        weights.rows("large", start, start + 4096)
    # 128 MiB pass through slabs of 8 MiB: the allocator may keep a few of those, and no page of the file stays mapped
    assert resident_kib("RssAnon") - anonymous < 64 * 1024
    assert resident_kib("RssFile") - mapped < 8 * 1024


def resident_kib(kind: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(kind)))
