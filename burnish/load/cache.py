"""Quantized weights on disk, so that the second start reads a quarter of the bytes and quantizes nothing.

One full-shape safetensors file for each decoder layer and one for the rest. Ranks write their own rows into the same file and the folder is
renamed when all are done, so its bytes do not depend on how many ranks wrote it, and a killed start leaves no half cache.
"""

import fcntl
import json
import logging
import os
import re
import shutil
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from burnish.parallel.world import any_rank, barrier, launched_rank
from burnish.runs import cache_root, digest

log = logging.getLogger("burnish")
_NAMES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
}


@dataclass
class Cache:
    """The cache of one model in one format.

    `key`: base fingerprint, format, its options and version, compute dtype; never the number of ranks.
    """

    folder: Path
    key: dict[str, Any]
    _open: dict[str, Any] = field(default_factory=dict)

    def holds(self, parameters: dict[str, Tensor]) -> bool:
        """Whether it is finished and its files have just these tensors, each in full; reads headers only.

        Damage is reported and answered with no, so that the next start writes it anew. What lies in the tensors is not checked.
        """
        if not (self.folder / "key.json").exists():
            return False
        try:
            damaged = [file for file, group in _by_file(parameters).items() if not _is_whole(self.folder / file, group)]
        except OSError as problem:
            damaged = [f"{problem.filename}: {problem.strerror}"]
        if damaged:
            log.warning("the quantized cache %s is damaged (%s) and will be written anew", self.folder, damaged[0])
        return not damaged

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor; reads no others."""
        file = file_of(name)
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, framework="pt")
        return self._open[file].get_slice(name)[start:stop]

    def start(self, parameters: dict[str, Tensor], device: torch.device) -> "Writing | None":
        """Prepares the files for these parameters (their full shapes); None, with a warning, where the disk will not take them."""
        partial = self.folder.with_name(self.folder.name + ".partial")
        lock = problem = None
        if launched_rank() == 0:
            try:
                partial.parent.mkdir(parents=True, exist_ok=True)
                lock = partial.with_suffix(".lock").open("w")
                fcntl.flock(
                    lock, fcntl.LOCK_EX | fcntl.LOCK_NB
                )  # another start may be writing the same; the system lets go of it if that dies
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                for file, group in _by_file(parameters).items():
                    _allocate(partial / file, group)
            except OSError as refused:
                problem = refused
        if any_rank(problem is not None, device):
            return _no_cache(partial, problem)
        try:
            writing = Writing(self, partial, parameters, lock)
        except OSError as refused:  # a rank on another machine, whose disk this folder is not on
            writing, problem = None, refused
        return _no_cache(partial, problem) if any_rank(problem is not None, device) else writing


def open_cache(key: dict[str, Any]) -> Cache:
    return Cache(cache_root() / "quantized" / digest(key), key)


def _no_cache(partial: Path, problem: OSError | None) -> None:
    """What all ranks do together where one cannot write: a start without a cache is only slower."""
    if problem is not None:
        log.warning("no quantized cache is kept (%s): %s", partial, problem.strerror)
        if not isinstance(problem, BlockingIOError):  # then it is another's
            shutil.rmtree(partial, ignore_errors=True)


class Writing:
    """A cache that is being written: each rank puts its own rows where they belong.

    A disk that refuses them costs the cache, not the start.
    """

    def __init__(self, cache: Cache, partial: Path, parameters: dict[str, Tensor], lock: Any) -> None:
        self.cache, self.partial, self.lock = cache, partial, lock
        self.problem: OSError | None = None
        self.offsets: dict[str, tuple[str, int, int]] = {}
        self.handles: dict[str, int] = {}
        for file, group in _by_file(parameters).items():
            header, starts = _header(group)
            for name, tensor in group.items():
                self.offsets[name] = (file, len(header) + starts[name], _row_bytes(tensor))
            self.handles[file] = os.open(partial / file, os.O_WRONLY)

    def rows(self, name: str, start: int, rows: Tensor) -> None:
        if self.problem is not None:
            return
        file, offset, row_bytes = self.offsets[name]
        content = memoryview(rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
        written = 0
        try:
            while written < len(content):
                written += os.pwrite(self.handles[file], content[written:], offset + start * row_bytes + written)
        except OSError as problem:
            self.problem = problem

    def finish(self, device: torch.device) -> None:
        """Waits for all ranks and makes the cache visible, whole."""
        try:
            for handle in self.handles.values():
                os.fsync(handle)
        except OSError as problem:
            self.problem = self.problem or problem
        failed = any_rank(self.problem is not None, device)
        if launched_rank() == 0 and not failed:
            try:
                (self.partial / "key.json").write_text(json.dumps({"burnish": "cache/1", "key": self.cache.key}))
                shutil.rmtree(self.cache.folder, ignore_errors=True)
                os.replace(self.partial, self.cache.folder)
            except OSError as problem:
                self.problem = problem
        if self.problem is not None:
            _no_cache(self.partial, self.problem)
        self.close()
        barrier()

    def close(self) -> None:
        for handle in self.handles.values():
            os.close(handle)
        self.handles = {}
        if self.lock is not None:
            self.lock.close()


def file_of(name: str) -> str:
    """`layer-00007.safetensors` for a tensor of decoder layer 7, `rest.safetensors` for embeddings, head and norms."""
    layer = re.search(r"\.(\d+)\.", name)
    return f"layer-{int(layer.group(1)):05d}.safetensors" if layer else "rest.safetensors"


def _by_file(parameters: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in parameters.items():
        groups.setdefault(file_of(name), {})[name] = tensor
    return groups


def _row_bytes(tensor: Tensor) -> int:
    return tensor.shape[1:].numel() * tensor.dtype.itemsize


def _header(group: dict[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """A safetensors header for full-shape tensors, and where each begins after it (format: huggingface/safetensors README)."""
    entries, starts, end = {}, {}, 0
    for name, tensor in group.items():
        starts[name], size = end, tensor.shape[0] * _row_bytes(tensor)
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, starts


def _allocate(path: Path, group: dict[str, Tensor]) -> None:
    header, _ = _header(group)
    size = sum(tensor.shape[0] * _row_bytes(tensor) for tensor in group.values())
    with path.open("wb") as file:
        file.write(header)
        file.flush()
        os.posix_fallocate(file.fileno(), 0, len(header) + size)  # a full disk is found here, not in the middle


def _is_whole(path: Path, group: dict[str, Tensor]) -> bool:
    header, _ = _header(group)
    with path.open("rb") as file:
        found = file.read(len(header))
    return found == header and path.stat().st_size == len(header) + sum(tensor.shape[0] * _row_bytes(tensor) for tensor in group.values())
