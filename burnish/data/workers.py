"""The same work on many groups, in several processes, in order, holding few of them at a time."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, TypeVar

Given = TypeVar("Given")
Got = TypeVar("Got")
AHEAD = 2
"""Groups for each process that are handed out before the first of them is taken back."""
_work: Callable[[Any], Any] | None = None


def in_order(work: Callable[[Given], Got], groups: Iterable[Given], processes: int) -> Iterator[tuple[Given, Got]]:
    """(group, work(group)) of each group, in the groups' order; with several processes, computed there.

    `work` is not sent but inherited, so that it may hold anything. An error of a group is raised where its turn comes.
    """
    if processes <= 1:
        for group in groups:
            yield group, work(group)
        return
    waiting: deque[tuple[Given, Future[Got]]] = deque()
    # forked: a worker that imports transformers anew takes seconds, and these compute with nothing that has threads
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), initializer=_begin, initargs=(work,))
    try:
        for group in groups:
            waiting.append((group, pool.submit(_one, group)))
            if len(waiting) > AHEAD * processes:
                given, future = waiting.popleft()
                yield given, future.result()
        for given, future in waiting:
            yield given, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work


def _one(group: Any) -> Any:
    assert _work is not None
    return _work(group)
