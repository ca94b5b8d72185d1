"""Two gloo ranks with FSDP2, a thread and a context each, against one process with two threads, at an equal global step.

SmolLM2, QDoRA, fp32. Seconds are those of a step, without the first two. The one process makes its step in one pass over both contexts, or
in two; what is compared is the faster. Its batches are the same rows.
Run: python benchmarks/ranks.py ROWS.jsonl [--context 1024] [--steps 6] [--strategy fsdp] [--pairs 5]
"""

import argparse
import json
import statistics
import sys

from finetuning import HERE
from side_by_side import compare, machine, rounds, tell

GOAL = 1.25


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", help="JSONL with `question` and `answer`")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--strategy", default="fsdp", choices=["fsdp", "fsdp-grad", "ddp"])
    parser.add_argument("--method", choices=["dora", "lora"], default="dora")
    parser.add_argument("--checkpointing", choices=["layers", "none"], default="none")
    parser.add_argument("--pairs", type=int, default=5)
    asked = parser.parse_args()
    print(json.dumps(machine(2)), flush=True)
    given = ["--rows", asked.rows, "--count", str(10 * asked.steps * asked.context // 1024), "--context", str(asked.context)]
    given += ["--method", asked.method, "--steps", str(asked.steps), "--contexts-per-step", "2", "--checkpointing", asked.checkpointing]
    side = [sys.executable, str(HERE / "our_side.py"), *given]
    sides = {
        f"2 ranks, {asked.strategy}": [*side, "--ranks", "2", "--strategy", asked.strategy, "--micro-batch", "1", "--threads", "1"],
        "1 process, one pass": [*side, "--micro-batch", "2"],
        "1 process, two passes": [*side, "--micro-batch", "1"],
    }
    several, *alone = sides
    each = rounds(sides, asked.pairs, {several: 1} | dict.fromkeys(alone, 2))
    for results in each:
        for result in results.values():
            result["a_step"] = statistics.median(result["each"][2:] or result["each"])
    for name in sides:
        losses = " → ".join(f"{loss:.6f}" for loss in each[0][name]["losses"])
        tell(name, each, "a_step", f"s a step of {each[0][name]['places'] // each[0][name]['steps']:,} tokens, loss {losses}")
    fastest = min(alone, key=lambda name: statistics.median(results[name]["a_step"] for results in each))
    compare(f"{several} / {fastest}, seconds a step", each, several, fastest, "a_step", GOAL)


if __name__ == "__main__":
    main()
