"""What a step of SmolLM2 would take if nothing but the libraries' kernels ran: how near to peft a step can come on this machine at all.

The step of `layer.py` (CPU, fp32, NF4, rank 64, six targets, 512 tokens, all of them trained), once as it is, once with the time of every
operator taken around it, which adds up to the step but for what Python does between them. (`torch.profiler` is not used: with it,
operators that write fresh memory take ten times as long on some machines.) An operator belongs to

    frozen      products without the rank or the vocabulary among their sizes
    adapters    products with the rank: A and B both ways, and W Aᵀ, A Aᵀ for DoRA's norm
    head        what has the vocabulary among its sizes: two products and the softmax
    attention   torch's fused kernel, forward and backward
    decoding    NF4, by bitsandbytes
    the rest    norms, rotary embeddings, activation, sums, DoRA's norm and m's gradient, the optimizer

The floor is all but the rest. peft runs the same attention, the same frozen products and the same head's products.
Run: python benchmarks/floor.py [--pairs 5] [--steps 3]
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from every_format import GOALS, METHODS
from layer import RANK, ours
from side_by_side import machine, rounds, timed

PARTS = ("frozen", "adapters", "head", "attention", "decoding", "the rest")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot")
VOCABULARY = 49152


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each kind in each process, after two that are not")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", choices=list(METHODS))
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(measure(asked)))
        return
    print(json.dumps(machine(asked.threads)), flush=True)
    more = ["--steps", str(asked.steps), "--threads", str(asked.threads)]
    layer = str(Path(__file__).with_name("layer.py"))
    sides = {f"peft {method}": [sys.executable, layer, *more, "--child", f"peft-q{method}"] for method in METHODS}
    sides |= {f"burnish {method}": [sys.executable, sys.argv[0], *more, "--child", method] for method in METHODS}
    each = rounds(sides, asked.pairs, asked.threads)
    titles = ("", "peft", "burnish", *PARTS, "together", "floor / peft", "to reach", "left for the rest")
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for method, name in METHODS.items():
        goal = GOALS[f"{method} / peft"]
        own, theirs = ([results[f"{side} {method}"] for results in each] for side in ("burnish", "peft"))
        peft, step = (statistics.median(one["seconds"] for one in side) for side in (theirs, own))
        parts = [statistics.median(one["parts"][part] for one in own) for part in PARTS]
        floors = [sum(one["parts"][part] for part in PARTS[:-1]) / other["seconds"] for one, other in zip(own, theirs, strict=True)]
        ratio = statistics.median(floors)
        cells = " | ".join(f"{seconds:.2f}" for seconds in (*parts, sum(parts)))
        floor = f"{ratio:.2f} ({min(floors):.2f} to {max(floors):.2f})"
        print(f"| Q{name} | {peft:.2f} s | {step:.2f} s | {cells} | {floor} | {goal} | {(goal - ratio) * peft:.2f} s |")


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Steps of one process, without and with the clock around each operator."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    torch.set_num_threads(asked.threads)

    class Clock(TorchDispatchMode):
        """Adds up the time of each part's operators."""

        def __init__(self) -> None:
            super().__init__()
            self.parts = Counter[str]()

        def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
            started = time.perf_counter()
            result = func(*args, **(kwargs or {}))
            self.parts[part_of(func, [one for one in (*args, result) if isinstance(one, torch.Tensor)])] += time.perf_counter() - started
            return result

    step = ours(asked.child, False)
    plain = timed(step, asked.steps + 2)[2:]
    clocks = []
    for _ in range(asked.steps):
        with Clock() as clock:
            step()
        clocks.append(clock.parts)
    return {"seconds": statistics.median(plain), "parts": {part: statistics.median(one[part] for one in clocks) for part in PARTS}}


def part_of(func: Any, tensors: list[Any]) -> str:
    """Which of PARTS an operator belongs to, by its name and the sizes of what it takes and gives."""
    name = func.overloadpacket.__name__.rstrip("_")
    sizes = {size for tensor in tensors for size in tensor.shape}
    if VOCABULARY in sizes and "embedding" not in name:
        return "head"
    if "attention" in name:
        return "attention"
    if func.namespace == "bitsandbytes":
        return "decoding"
    if name in PRODUCTS and 1 not in sizes:  # m's gradient is summed by a product with ones
        return "adapters" if RANK in sizes else "frozen"
    return "the rest"


if __name__ == "__main__":
    main()
