"""The second start gives the first one's bytes without reading a dense weight, and no cache, however damaged, stops a start."""

import errno
import fcntl
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from burnish.load import cache as caching
from burnish.load.safetensors_reader import SafetensorsWeights
from burnish.model.formats import FORMATS
from tests.tiny import a_plan, built_from, tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The tensors of the model's own files that were read, with repetition."""
    seen: list[str] = []
    original = SafetensorsWeights.rows
    monkeypatch.setattr(SafetensorsWeights, "rows", lambda self, name, start, stop: seen.append(name) or original(self, name, start, stop))
    return seen


def start(folder: Path, **changes):
    plan = {key: changes.pop(key) for key in ("dtype",) if key in changes}
    return built_from(folder, {"cache": True} | changes, plan=a_plan(**plan))


def caches(cache_folder: Path) -> list[Path]:
    """Finished ones."""
    return sorted(path.parent for path in cache_folder.glob("quantized/*/key.json") if not path.parent.name.endswith(".partial"))


def assert_same(one, other):
    for (name, first), (other_name, second) in zip(one.model.named_parameters(), other.model.named_parameters(), strict=True):
        assert name == other_name
        assert torch.equal(first, second), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_the_second_start_equals_the_first_bit_for_bit_and_reads_no_weight(folder, cache_folder, reads, dtype):
    first = start(folder, dtype=dtype)
    assert len(set(reads)) == 21
    assert len(caches(cache_folder)) == 1
    reads.clear()
    assert_same(start(folder, dtype=dtype), first)
    assert reads == []
    assert_same(built_from(folder, plan=a_plan(dtype=dtype)), first)


def test_the_files_are_plain_safetensors_one_for_each_layer(folder, cache_folder):
    built = start(folder)
    (cached,) = caches(cache_folder)
    assert sorted(path.name for path in cached.iterdir()) == [
        "key.json",
        "layer-00000.safetensors",
        "layer-00001.safetensors",
        "rest.safetensors",
    ]
    with safe_open(cached / "layer-00001.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("model.layers.1.mlp.up_proj.packed"), built.linears["model.layers.1.mlp.up_proj"].packed)


@pytest.mark.parametrize("change", [{"block": 32}, {"dtype": "bf16"}, {"dtype": "fp64"}])
def test_another_block_or_dtype_has_a_cache_of_its_own(folder, cache_folder, change):
    start(folder)
    other = start(folder, **change)
    assert len(caches(cache_folder)) == 2
    assert_same(start(folder, **change), other)


def test_another_base_has_a_cache_of_its_own(folder, cache_folder, tmp_path):
    start(folder)
    start(tiny_folder(tmp_path / "other", seed=8))
    assert len(caches(cache_folder)) == 2


def test_another_version_of_the_format_has_a_cache_of_its_own(folder, cache_folder, monkeypatch):
    import dataclasses

    start(folder)
    monkeypatch.setitem(FORMATS, "nf4", dataclasses.replace(FORMATS["nf4"], version=2))
    start(folder)
    assert len(caches(cache_folder)) == 2


def test_the_folder_may_move_and_the_cache_still_serves(folder, cache_folder, reads, tmp_path):
    start(folder)
    reads.clear()
    start(shutil.copytree(folder, tmp_path / "moved"))
    assert reads == []


def test_an_unquantized_model_and_one_that_asks_for_none_have_no_cache(folder, cache_folder):
    start(folder, format="none")
    start(folder, cache=False)
    assert not cache_folder.exists()


# --- damage


def test_a_half_written_cache_is_not_used_and_is_replaced(folder, cache_folder, reads):
    first = start(folder)
    (cached,) = caches(cache_folder)
    os.replace(cached, cached.with_name(cached.name + ".partial"))  # killed before the rename
    reads.clear()
    assert_same(start(folder), first)
    assert reads
    assert caches(cache_folder) == [cached]
    assert not cached.with_name(cached.name + ".partial").exists()


@pytest.mark.parametrize("damage", ["cut short", "grown", "gone", "empty", "another header"])
def test_a_damaged_cache_is_reported_and_written_anew(folder, cache_folder, reads, damage, caplog):
    first = start(folder)
    (cached,) = caches(cache_folder)
    victim = cached / "layer-00001.safetensors"
    content = victim.read_bytes()
    {
        "cut short": lambda: victim.write_bytes(content[:-1]),
        "grown": lambda: victim.write_bytes(content + b"\0"),
        "gone": victim.unlink,
        "empty": lambda: victim.write_bytes(b""),
        "another header": lambda: victim.write_bytes(content.replace(b"up_proj", b"pu_proj")),
    }[damage]()
    reads.clear()
    with caplog.at_level(logging.WARNING, "burnish"):
        assert_same(start(folder), first)
    assert reads
    assert "layer-00001.safetensors" in caplog.text
    assert "will be written anew" in caplog.text
    reads.clear()
    assert_same(start(folder), first)
    assert reads == []


# --- disks that refuse


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("where", ["mkdir", "_allocate", "pwrite", "fsync", "replace"])
def test_a_disk_that_refuses_the_cache_costs_a_warning_and_not_the_start(folder, cache_folder, where, error, monkeypatch, caplog):
    def refuse(*_, **__):
        raise OSError(error, os.strerror(error))

    first = built_from(folder)
    owner = {"mkdir": Path, "_allocate": caching}.get(where, os)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "burnish"):
        patch.setattr(owner, where, refuse)
        found = start(folder)
    assert_same(found, first)
    assert [record.getMessage() for record in caplog.records if "no quantized cache is kept" in record.getMessage()]
    assert os.strerror(error) in caplog.text
    assert caches(cache_folder) == []
    assert list(cache_folder.glob("quantized/*.partial")) == []
    start(folder)  # and the next start, with a disk that takes it, keeps one
    assert len(caches(cache_folder)) == 1


def test_a_cache_folder_that_is_a_file_costs_a_warning(folder, cache_folder, caplog):
    cache_folder.write_text("")
    with caplog.at_level(logging.WARNING, "burnish"):
        start(folder)
    assert "no quantized cache is kept" in caplog.text


def test_two_starts_at_once_do_not_write_into_each_others_files(folder, cache_folder, caplog):
    first = start(folder)
    (cached,) = caches(cache_folder)
    shutil.rmtree(cached)
    partial = cached.with_name(cached.name + ".partial")
    partial.mkdir()
    (partial / "another's").write_text("")
    with partial.with_suffix(".lock").open("w") as lock, caplog.at_level(logging.WARNING, "burnish"):
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_same(start(folder), first)
    assert "no quantized cache is kept" in caplog.text
    assert (partial / "another's").exists()
    assert caches(cache_folder) == []
    start(folder)
    assert caches(cache_folder) == [cached]


def test_a_start_that_stops_in_the_middle_leaves_no_finished_cache_and_lets_go_of_the_lock(folder, cache_folder, monkeypatch):
    original = SafetensorsWeights.rows

    def stops(self, name, start, stop):
        if "layers.1.mlp" in name:
            raise KeyboardInterrupt
        return original(self, name, start, stop)

    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsWeights, "rows", stops)
        with pytest.raises(KeyboardInterrupt):
            start(folder)
    assert caches(cache_folder) == []
    start(folder)
    assert len(caches(cache_folder)) == 1


def test_the_cache_lies_where_burnish_cache_says_and_in_the_home_folder_otherwise(monkeypatch, tmp_path):
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "here"))
    assert caching.cache_root() == tmp_path / "here"
    monkeypatch.delenv("BURNISH_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert caching.cache_root() == tmp_path / ".cache" / "burnish"


def test_the_key_says_what_the_cache_was_made_of(folder, cache_folder):
    start(folder)
    (cached,) = caches(cache_folder)
    written = json.loads((cached / "key.json").read_text())
    assert written["burnish"] == "cache/1"
    assert set(written["key"]) == {"base", "format", "version", "block", "dtype"}


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("model.layers.7.mlp.up_proj.packed", "layer-00007.safetensors"),
        ("transformer.h.12.ln_1.weight", "layer-00012.safetensors"),
        ("model.norm.weight", "rest.safetensors"),
        ("lm_head.weight", "rest.safetensors"),
    ],
)
def test_a_tensor_is_in_its_layers_file(name, file):
    assert caching.file_of(name) == file
