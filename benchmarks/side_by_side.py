"""Interleaved measurement of whole processes: A B A B, medians, the ratio of each pair, versions and machine printed.

A script with variants of one step calls `main(VARIANTS, COMPARISONS)`: each measurement is a fresh process of the same script that prints a
JSON line. A script whose sides are commands of their own calls `rounds` and `compare`.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

Step = Callable[[], Any]
Result = dict[str, Any]
PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "burnish")


# --- variants of one step


def main(variants: dict[str, Callable[[], Step]], comparisons: list[tuple[str, str, str, float]]) -> None:
    """`comparisons`: (what, variant A, variant B, the ratio A / B to reach)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", choices=list(variants))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="timed steps in each process, after two that are not")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="comparisons whose name holds this")
    asked = parser.parse_args()
    if asked.child:
        _child(variants[asked.child], asked.steps, asked.threads)
        return
    print(json.dumps(machine(asked.threads)), flush=True)
    for what, a, b, goal in comparisons:
        if not asked.only or asked.only in what:
            sides = {name: [sys.executable, sys.argv[0], "--child", name, "--steps", str(asked.steps)] for name in (a, b)}
            each = rounds(
                {name: [*command, "--threads", str(asked.threads)] for name, command in sides.items()}, asked.pairs, asked.threads
            )
            for name in (a, b):
                tell(name, each, "seconds", "s a step")
            compare(what, each, a, b, "seconds", goal)


def _child(build: Callable[[], Step], steps: int, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    seconds = timed(build(), steps + 2)
    print(json.dumps({"seconds": statistics.median(seconds[2:]), "all": seconds, "peak_bytes": peak_bytes()}))


def timed(step: Step, count: int) -> list[float]:
    """Seconds of each of `count` calls."""
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return seconds


# --- whole processes


def rounds(sides: dict[str, list[str]], count: int, threads: int | dict[str, int]) -> list[dict[str, Result]]:
    """What each side printed, `count` times, the sides in turn. A command's last line is a JSON object."""
    return [
        {name: run(command, threads[name] if isinstance(threads, dict) else threads) for name, command in sides.items()}
        for _ in range(count)
    ]


def run(command: list[str], threads: int) -> Result:
    """What a fresh process prints as its last line, with `wall_seconds`, and `peak_bytes` where it does not say: of the largest process."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=err)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        said, complaint = out.read(), err.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{said[-2000:]}{complaint[-8000:]}")
    lines = said.splitlines()
    printed = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    return {"wall_seconds": seconds, "peak_bytes": used.ru_maxrss * 1024} | printed


def tell(name: str, each: list[dict[str, Result]], key: str, unit: str, digits: int = 3) -> None:
    """A side's median of one number, its range, and its peak memory."""
    values = [results[name][key] for results in each]
    peak = statistics.median(results[name]["peak_bytes"] for results in each)
    print(
        f"  {name:28} {statistics.median(values):.{digits}f} {unit} ({min(values):.{digits}f} to {max(values):.{digits}f}), "
        f"peak {peak / 1e9:.2f} GB"
    )


def compare(what: str, each: list[dict[str, Result]], a: str, b: str, key: str, goal: float, at_least: bool = False) -> None:
    """The ratio A / B of each round: its median, its range, and whether it is at most (or at least) `goal`."""
    ratios = [results[a][key] / results[b][key] for results in each]
    ratio = statistics.median(ratios)
    verdict = "reached" if (ratio >= goal if at_least else ratio <= goal) else "NOT reached"
    least = "at least " if at_least else ""
    print(
        f"{what}: {ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} pairs); to reach {least}{goal}: {verdict}", flush=True
    )


def peak_bytes() -> int:
    """The most memory that this process had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine(threads: int, packages: tuple[str, ...] = PACKAGES) -> Result:
    """Processor, versions, and the load that the machine has before anything is measured: above 0.3, nothing here means much."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    with open("/proc/cpuinfo") as file:
        processor = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), platform.processor())
    about = {"processor": processor, "cores": os.cpu_count(), "threads": threads, "load": os.getloadavg()[0]}
    return about | {"python": platform.python_version(), **versions}
