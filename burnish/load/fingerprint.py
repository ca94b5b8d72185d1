"""A name for the content of a base model that takes seconds, not the time to read 140 GB."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

WHOLE = 64 * 1024
PAGES = 4
PAGE_BYTES = WHOLE // PAGES  # few large pages: on a spinning disk the seeks cost more than the bytes


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file stores it. `read(offset, count)` gives bytes of it, in row order."""

    name: str
    shape: tuple[int, ...]
    kind: str
    """How the bytes are to be understood: the dtype's name in the file, and whatever else changes the values read from them."""
    bytes: int
    read: Callable[[int, int], bytearray]


def fingerprint(tensors: Iterable[StoredTensor]) -> str:
    """32 hexadecimal digits over names, shapes, kinds and sampled bytes; the order of `tensors` and their files do not matter.

    Reads at most 64 KiB of a tensor: all of a small one, else four pages spread from its first byte to its last. So it tells
    models and their finetunes apart, and a copy that was cut short; it is **not** a checksum: a change between the sampled pages
    of a large tensor goes unseen.
    """
    total = hashlib.sha256(b"burnish fingerprint/1")
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        entry = [tensor.name, tensor.shape, tensor.kind, tensor.bytes, _sampled(tensor)]
        total.update(json.dumps(entry).encode() + b"\n")
    return total.hexdigest()[:32]


def _sampled(tensor: StoredTensor) -> str:
    content = hashlib.sha256()
    for offset, count in sampled_pages(tensor.bytes):
        content.update(tensor.read(offset, count))
    return content.hexdigest()


def sampled_pages(tensor_bytes: int) -> list[tuple[int, int]]:
    """(offset, count) of the pages that are hashed of a tensor of so many bytes."""
    if tensor_bytes <= WHOLE:
        return [(0, tensor_bytes)] if tensor_bytes else []
    last = tensor_bytes - PAGE_BYTES
    return [(last * page // (PAGES - 1), PAGE_BYTES) for page in range(PAGES)]
