"""Four long-lived worker processes: importing torch and transformers costs some seconds a process, and many tests need two or four.

A worker is told a function and its arguments, joins the others of that job by gloo, and sends back what the function returns.
"""

import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.multiprocessing as multiprocessing

SECONDS = 300
GRACE_SECONDS = 5
"""For the other ranks, once one has failed: they may wait for it in a collective, without an end."""


class Pool:
    """Runs a function on 1 … 4 ranks at once."""

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for _ in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, ranks: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `work(*arguments)` returns on each of `ranks` processes, rank by rank. Raises with the first traceback that a rank sends.

        Where some do not answer after that, or at all, or died, all are started anew, so that one failure is not the next test's too.
        """
        port = _free_port()
        for rank, pipe in enumerate(self.pipes[:ranks]):
            pipe.send(
                (work, arguments, {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
            )
        answers = self._answers(ranks)
        silent = sorted(set(range(ranks)) - answers.keys())
        if silent or not all(process.is_alive() for process in self.processes):
            self.close()
            self._start()
        problems = [problem for problem, _ in answers.values() if problem]
        assert not problems, problems[0]
        assert not silent, f"rank {silent[0]} does not answer"
        return [answers[rank][1] for rank in range(ranks)]

    def _answers(self, ranks: int) -> dict[int, tuple[str | None, Any]]:
        """By rank, in the order in which they came."""
        answers: dict[int, tuple[str | None, Any]] = {}
        until = time.monotonic() + SECONDS
        while len(answers) < ranks:
            waited_for = {self.pipes[rank]: rank for rank in range(ranks) if rank not in answers}
            ready = wait(list(waited_for), timeout=max(0.0, until - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = waited_for[pipe]  # pyright: ignore[reportArgumentType]
                try:
                    answers[rank] = self.pipes[rank].recv()
                except (EOFError, ConnectionResetError):
                    self.processes[rank].join(GRACE_SECONDS)
                    answers[rank] = (f"rank {rank} died with {self.processes[rank].exitcode}", None)
                if answers[rank][0]:
                    until = min(until, time.monotonic() + GRACE_SECONDS)
        return answers

    def close(self) -> None:
        for process in self.processes:
            process.kill()  # not `terminate`: a training turns that into a save
        for process in self.processes:
            process.join()


def _serve(pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        work, arguments, environment = pipe.recv()
        os.environ.update({name: str(value) for name, value in environment.items()})
        try:
            pipe.send((None, work(*arguments)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
