"""How long `burnish --help` takes, beside Python alone and with typer: python benchmarks/command_line.py [--times 20]"""

import argparse
import json
import statistics
import sys

from side_by_side import machine, rounds, tell

GOAL = 0.5
SIDES = {
    "burnish --help": ["-m", "burnish.cli", "--help"],
    "import typer, rich": ["-c", "import typer, rich.console"],
    "python": ["-c", ""],
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=20)
    asked = parser.parse_args()
    print(json.dumps(machine(1)), flush=True)
    each = rounds({name: [sys.executable, *words] for name, words in SIDES.items()}, asked.times, 1)
    for name in SIDES:
        tell(name, each, "wall_seconds", "s")
    median = statistics.median(results["burnish --help"]["wall_seconds"] for results in each)
    print(f"burnish --help: {median:.2f} s; to reach {GOAL}: {'reached' if median <= GOAL else 'NOT reached'}")


if __name__ == "__main__":
    main()
