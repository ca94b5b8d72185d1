"""How many bytes are alive, and what they are: counted while code runs, on real tensors and on fake ones alike."""

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from burnish.parallel.private import TorchDispatchMode, tree_leaves
from burnish.parallel.rows import here

WORK, GATHERED, GRADIENTS, GAINS = "work", "gathered", "gradients", "gains"
_EXCHANGE = ("c10d", "fsdp")


class Live(TorchDispatchMode):
    """Inside the block, counts the bytes of storages that operators make, until these are freed. The tensors of `known` are not counted.

    What collectives read or write, and storages that are resized (FSDP2 frees and refills its gathered parameters so), is GATHERED;
    what `tag` is told, that; all else WORK.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.by: Counter[str] = Counter()
        self.by_at_peak: Counter[str] = Counter()
        self._seen: dict[int, weakref.ref[Any]] = {}
        self._size: dict[int, int] = {}
        self._kind: dict[int, str] = {}
        self._resize: Any = None
        for tensor in known:
            self._watch(here(tensor).untyped_storage(), 0, WORK)

    def __enter__(self) -> Any:
        self._resize = original = (
            torch.UntypedStorage.resize_
        )  # no operator: a dispatch mode does not see it (torch's MemTracker does the same)

        def resize(storage: Any, size: int) -> Any:
            result = original(storage, size)
            if id(storage) in self._seen:
                self._resized(id(storage), storage.nbytes())
            return result

        torch.UntypedStorage.resize_ = resize  # pyright: ignore[reportAttributeAccessIssue]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        kind = GATHERED if func.namespace in _EXCHANGE else WORK
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = here(leaf).untyped_storage()
                if id(storage) not in self._seen:
                    self._watch(storage, storage.nbytes(), kind)
        if kind == GATHERED:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    self.tag(leaf, GATHERED)
        return result

    def tag(self, tensor: Tensor, kind: str) -> None:
        """Counts the storage behind a tensor as `kind` from now on."""
        key = id(here(tensor).untyped_storage())
        size = self._size.get(key, 0)
        if size and self._kind[key] != kind:
            self.by[self._kind[key]] -= size
            self.by[kind] += size
            self._kind[key] = kind

    def begin(self) -> None:
        """The peak is counted anew from here."""
        self.peak, self.by_at_peak = self.now, self.by.copy()

    def _watch(self, storage: Any, size: int, kind: str) -> None:
        key = id(storage)
        self._seen[key] = weakref.ref(storage, lambda _: self._gone(key))
        self._size[key], self._kind[key] = size, kind
        self._grown(kind, size)

    def _resized(self, key: int, size: int) -> None:
        before, kind = self._size[key], self._kind[key]
        self._size[key], self._kind[key] = size, GATHERED
        self.by[kind] -= before
        self.now -= before
        self._grown(GATHERED, size)

    def _grown(self, kind: str, size: int) -> None:
        self.by[kind] += size
        self.now += size
        if self.now > self.peak:
            self.peak, self.by_at_peak = self.now, self.by.copy()

    def _gone(self, key: int) -> None:
        size = self._size.pop(key)
        self.by[self._kind.pop(key)] -= size
        self.now -= size
        self._seen.pop(key)
