"""Interleaved measurement of whole processes: A B A B, medians, the ratio of each pair, versions and machine printed.

A script with variants calls `main(VARIANTS, COMPARISONS)`. Each measurement is a fresh process of the same script that prints a JSON line.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

Step = Callable[[], None]
PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "burnish")


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
    print(json.dumps(_machine(asked.threads)))
    for what, a, b, goal in comparisons:
        if not asked.only or asked.only in what:
            _compare(what, a, b, goal, asked)


def _compare(what: str, a: str, b: str, goal: float, asked: argparse.Namespace) -> None:
    pairs = [(_measure(a, asked), _measure(b, asked)) for _ in range(asked.pairs)]
    ratios = [first["seconds"] / second["seconds"] for first, second in pairs]
    for name, side in ((a, 0), (b, 1)):
        seconds = [pair[side]["seconds"] for pair in pairs]
        peak = statistics.median(pair[side]["peak_bytes"] for pair in pairs)
        print(f"  {name:28} {statistics.median(seconds):.3f} s a step ({min(seconds):.3f} to {max(seconds):.3f}), peak {peak / 1e9:.2f} GB")
    ratio = statistics.median(ratios)
    verdict = "reached" if ratio <= goal else "NOT reached"
    print(f"{what}: {ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} pairs); to reach {goal}: {verdict}", flush=True)


def _measure(variant: str, asked: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, sys.argv[0], "--child", variant, "--steps", str(asked.steps), "--threads", str(asked.threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(asked.threads), "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{variant} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _child(build: Callable[[], Step], steps: int, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    step = build()
    seconds = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": statistics.median(seconds[2:]), "all": seconds, "peak_bytes": peak}))


def _machine(threads: int) -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    with open("/proc/cpuinfo") as file:
        processor = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), platform.processor())
    return {"processor": processor, "cores": os.cpu_count(), "threads": threads, "python": platform.python_version(), **versions}
