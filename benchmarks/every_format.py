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
METHODS = {"dora": "DoRA", "lora": "LoRA"}
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
    names += [f"burnish-q{method}{part}@{name}" for name in formats for method in methods]
    command = [sys.executable, str(Path(__file__).with_name("layer.py")), "--steps", str(asked.steps), "--threads", str(asked.threads)]
    dora, lora = (f"burnish-q{method}{part}@{{}}" for method in ("dora", "lora"))
    ratios = [("QDoRA / peft", dora, f"peft-qdora{part}", GOALS["layer" if asked.layer else "dora / peft"])]
    if not asked.layer:
        ratios += [("QLoRA / peft", lora, "peft-qlora", GOALS["lora / peft"]), ("QDoRA / QLoRA", dora, lora, GOALS["dora / lora"])]
    each = rounds({name: [*command, "--child", name] for name in names}, asked.pairs, asked.threads)

    def ratio(a: str, b: str) -> str:
        ratios = [results[a]["seconds"] / results[b]["seconds"] for results in each]
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"

    def cell(name: str) -> str:
        seconds, peak = (statistics.median(results[name][key] for results in each) for key in ("seconds", "peak_bytes"))
        return f"{seconds:.2f} s, {peak / 1e9:.2f} GB"

    titles = ["", *(f"Q{METHODS[method]}" for method in methods), *(f"{what} (to reach {goal})" for what, *_, goal in ratios)]
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    print(f"| peft, nf4 | {' | '.join(cell(f'peft-q{method}{part}') for method in methods)} |{' - |' * len(ratios)}")
    for name in formats:
        cells = [cell(f"burnish-q{method}{part}@{name}") for method in methods]
        cells += [ratio(a.format(name), b.format(name)) for _, a, b, _ in ratios]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
