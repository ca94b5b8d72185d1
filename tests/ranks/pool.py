"""Four long-lived worker processes: importing torch and transformers costs some seconds a process, and many tests need two or four.

A worker is told a function and its arguments, joins the others of that job by gloo, and sends back what the function returns.
"""

import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch.multiprocessing as multiprocessing

SECONDS = 300


class Pool:
    """Runs a function on 1 … 4 ranks at once."""

    def __init__(self, size: int = 4) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, ranks: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `work(*arguments)` returns on each of `ranks` processes, rank by rank. Raises with the first traceback that a rank sends."""
        port = _free_port()
        for rank, pipe in enumerate(self.pipes[:ranks]):
            pipe.send(
                (work, arguments, {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
            )
        answers = []
        for rank, pipe in enumerate(self.pipes[:ranks]):
            assert pipe.poll(SECONDS), f"rank {rank} does not answer"
            answers.append(pipe.recv())
        problems = [problem for problem, _ in answers if problem]
        assert not problems, problems[0]
        return [answer for _, answer in answers]

    def close(self) -> None:
        for process in self.processes:
            process.terminate()


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
