"""Peak memory above the weights in a training with checkpointing, burnish against TRL's SFTTrainer: SmolLM2, QDoRA, fp32.

Both sides train on packed contexts of the same rows (2,048 tokens), a context a step, and recompute every decoder layer.
"Above the weights" is the most memory that was resident during the loop, less what was resident when it began, with libraries, weights and
adapters in their places and what loading had freed given back to the system: activations, gradients, the optimizer, and what they waste.

Run: python benchmarks/memory.py ROWS.jsonl --trl TRL/bin/python [--count 24] [--pairs 5]. TRL's environment: see trl_side.py.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from finetuning import HERE, write_folder
from side_by_side import compare, machine, rounds

GOAL = 0.50


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", help="JSONL with `question` and `answer`")
    parser.add_argument("--trl", required=True, help="the Python of TRL's environment")
    parser.add_argument("--count", type=int, default=24, help="rows; 24 of GSM8K fill two contexts")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--method", choices=["dora", "lora"], default="dora")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    print(json.dumps(machine(asked.threads)), flush=True)
    given = ["--rows", asked.rows, "--count", str(asked.count), "--context", str(asked.context), "--method", asked.method]
    given += ["--threads", str(asked.threads)]
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder))
        ours = [sys.executable, str(HERE / "our_side.py"), "--model", folder, *given, "--micro-batch", "1", "--checkpointing", "layers"]
        theirs = [asked.trl, str(HERE / "trl_side.py"), "--model", folder, *given, "--packing", "--checkpointing"]
        each = rounds({"burnish": ours, "trl": theirs}, asked.pairs, asked.threads)
    print(json.dumps(each[0]["trl"]["versions"]))
    print("| | above the weights | before the loop | peak of the process | places a step | seconds a step |\n|---|---|---|---|---|---|")
    for name, first in each[0].items():
        for results in each:
            results[name]["a_step"] = results[name]["seconds"] / results[name]["steps"]
        keys = ("above_bytes", "weights_bytes", "peak_bytes", "a_step")
        above, before, peak, seconds = (statistics.median(results[name][key] for results in each) for key in keys)
        places = first["places"] // first["steps"]
        print(f"| {name} | {above / 1e9:.2f} GB | {before / 1e9:.2f} GB | {peak / 1e9:.2f} GB | {places:,} | {seconds:.1f} |")
    compare("burnish / trl, peak above the weights", each, "burnish", "trl", "above_bytes", GOAL)


if __name__ == "__main__":
    main()
