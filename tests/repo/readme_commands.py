"""Runs the commands of the README's fenced `sh` blocks, in order, as a reader would; all but blocks that start with `# not run here`."""

import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def commands(text: str) -> list[str]:
    """One command a line, without comments."""
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in _of(block)]
    assert lines, "the README shows no command"
    return lines


def _of(block: str) -> list[str]:
    if block.startswith("# not run here"):
        print(f"left out: {block.splitlines()[0]}")
        return []
    return [line.partition("  #")[0].strip() for line in block.splitlines() if line.strip() and not line.startswith("#")]


def main() -> None:
    for command in commands((ROOT / "README.md").read_text(encoding="utf-8")):
        print(f"$ {command}", flush=True)
        started = time.monotonic()
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, input="Which vessel is the oldest?\n/quit\n", text=True)
        print(f"  ({time.monotonic() - started:.0f} s)", flush=True)
        if done.returncode:
            sys.exit(f"{command!r} of the README ended with {done.returncode}")


if __name__ == "__main__":
    main()
