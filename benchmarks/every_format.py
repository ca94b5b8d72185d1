"""The layer's ratios for every format of the base: a step of SmolLM2, or one decoder layer of Llama-3-8B's shape, as `layer.py` has them.

The peer is peft over bitsandbytes' NF4 for all of them: it has no others on a CPU. All sides run in turn, once in each round, each a
fresh process; a ratio is of the same round. With all formats a round of SmolLM2 is some 35 processes of half a minute.
Run: python benchmarks/every_format.py [--formats nf4,int4,hqq4] [--layer] [--pairs 5] [--steps 3]
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from layer import VARIANTS
from side_by_side import machine, rounds

FORMATS = tuple(dict.fromkeys(name.partition("@")[2] for name in VARIANTS if "@" in name))
GOALS = {"dora / peft": 0.65, "lora / peft": 0.80, "dora / lora": 1.08, "layer": 0.60}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--layer", action="store_true", help="one decoder layer of Llama-3-8B's shape")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed steps in each process, after two that are not")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    print(json.dumps(machine(asked.threads)), flush=True)
    formats, part = asked.formats.split(","), "-8b-layer" if asked.layer else ""
    methods = ("dora",) if asked.layer else ("dora", "lora")
    names = [f"peft-q{method}{part}" for method in methods]
    names += [f"burnish-q{method}{part}@{name}" for name in formats for method in ("dora", "lora")]
    command = [sys.executable, str(Path(__file__).with_name("layer.py")), "--steps", str(asked.steps), "--threads", str(asked.threads)]
    each = rounds({name: [*command, "--child", name] for name in names}, asked.pairs, asked.threads)

    def ratio(a: str, b: str) -> str:
        ratios = [results[a]["seconds"] / results[b]["seconds"] for results in each]
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"

    def cell(name: str) -> str:
        seconds, peak = (statistics.median(results[name][key] for results in each) for key in ("seconds", "peak_bytes"))
        return f"{seconds:.2f} s, {peak / 1e9:.2f} GB"

    dora_goal, lora_goal, own_goal = GOALS["layer" if asked.layer else "dora / peft"], GOALS["lora / peft"], GOALS["dora / lora"]
    print(f"| | QDoRA | QLoRA | QDoRA / peft (to reach {dora_goal}) | QLoRA / peft ({lora_goal}) | QDoRA / QLoRA ({own_goal}) |")
    print("|---|---|---|---|---|---|")
    print(f"| peft, nf4 | {' | '.join(cell(f'peft-q{method}{part}') for method in methods)} |{' - |' * (5 - len(methods))}")
    for name in formats:
        dora, lora = (f"burnish-q{method}{part}@{name}" for method in ("dora", "lora"))
        against = ratio(lora, "peft-qlora") if not asked.layer else "-"
        row = (name, cell(dora), cell(lora), ratio(dora, f"peft-qdora{part}"), against, ratio(dora, lora))
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
