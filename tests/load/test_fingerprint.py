"""The fingerprint goes by content: not by files, and sensitive to whatever it samples."""

from pathlib import Path

import pytest

from burnish.load.fingerprint import PAGE_BYTES, PAGES, WHOLE, StoredTensor, fingerprint, sampled_pages
from burnish.load.safetensors_reader import open_safetensors

CONTENT = {"a": bytes(range(256)) * 16, "b": bytes(range(255)) * 4096}


def stored(name: str, content: bytes, shape: tuple[int, ...] | None = None, kind: str = "U8") -> StoredTensor:
    def read(offset: int, count: int) -> bytearray:
        return bytearray(content[offset : offset + count])

    return StoredTensor(name, shape or (len(content),), kind, len(content), read)


def test_neither_files_nor_order_matter(folder: Path, shards: Path) -> None:
    assert open_safetensors(folder).fingerprint() == open_safetensors(shards).fingerprint()
    tensors = [stored(name, content) for name, content in CONTENT.items()]
    assert fingerprint(tensors) == fingerprint(tensors[::-1])


@pytest.mark.parametrize("byte", [0, 100, 4095])
def test_one_changed_byte_of_a_small_tensor_changes_it(byte: int) -> None:
    changed = bytearray(CONTENT["a"])
    changed[byte] ^= 1
    assert fingerprint([stored("a", CONTENT["a"])]) != fingerprint([stored("a", bytes(changed))])


@pytest.mark.parametrize("page", range(PAGES))
def test_one_changed_byte_of_a_sampled_page_changes_it(page: int) -> None:
    changed = bytearray(CONTENT["b"])
    offset, count = sampled_pages(len(changed))[page]
    changed[offset + count - 1] ^= 1
    assert fingerprint([stored("b", CONTENT["b"])]) != fingerprint([stored("b", bytes(changed))])


def test_name_shape_and_dtype_change_it() -> None:
    content = CONTENT["a"]
    variants = [
        stored("a", content),
        stored("A", content),
        stored("a", content, (64, 64)),
        stored("a", content, kind="I8"),
        stored("a", content[:-1]),
    ]
    assert len({fingerprint([variant]) for variant in variants}) == len(variants)
    assert fingerprint(variants[:1]) != fingerprint([])


@pytest.mark.parametrize("size", [0, 1, WHOLE, WHOLE + 1, 10 * WHOLE + 3, 10**11])
def test_the_sample_reaches_both_ends_and_is_at_most_64_kib(size: int) -> None:
    pages = sampled_pages(size)
    assert sum(count for _, count in pages) == min(size, WHOLE)
    if size:
        assert pages[0][0] == 0
        assert sum(pages[-1]) == size
    assert all(count == PAGE_BYTES for _, count in pages) or size <= WHOLE
