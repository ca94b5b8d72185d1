"""Anonymous host memory while a model is loaded, above what the rank keeps of it: peak, and what is left when it is filled.

A folder with decoder layers of Llama-3-8B's shape is written, with random weights. Each measurement is a fresh process (or ranks of one),
which fills the model from it on a CPU while a thread samples RssAnon of /proc/self/status. (tracemalloc does not see torch's memory; pages
of files do not count, since the system may take them back.)
Run: python benchmarks/loading.py [--formats nf4,int4] [--ranks 1,2] [--layers 2] [--dtype bf16]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

TO_REACH = 128 << 20
"""Two slabs of 64 MiB, whatever slabs there are."""
SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32_000,
    "max_position_embeddings": 8192,
}


def write_model(folder: Path, layers: int, dtype: torch.dtype) -> None:
    """config.json and model.safetensors, a tensor at a time."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**SHAPE, num_hidden_layers=layers)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.empty(tensor.shape, dtype=dtype).normal_(std=0.02, generator=generator) for name, tensor in network.named_parameters()
    }
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def anonymous() -> int:
    """Bytes of this process that are resident and no file's."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


@contextmanager
def sampled() -> Iterator[dict[str, int]]:
    """The most that `anonymous` was inside the block, looked at every half millisecond."""
    found, done = {"peak": anonymous()}, threading.Event()

    def look() -> None:
        while not done.wait(0.0005):
            found["peak"] = max(found["peak"], anonymous())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found["peak"] = max(found["peak"], anonymous())


def fill_once(folder: str, form: str, ranks: int) -> dict[str, Any]:
    """Fills this rank's rows; libraries that quantizing imports are in memory before."""
    from burnish.config import AdaptConfig, ModelConfig, Plan
    from burnish.load.pretrained import find_model
    from burnish.load.weights import open_weights
    from burnish.model.formats import FORMATS
    from burnish.model.linear import QuantLinear
    from burnish.parallel.rows import local_rows
    from burnish.parallel.world import world
    from burnish.skeleton import fill, skeleton

    torch.set_num_threads(1)
    model, adapt = ModelConfig(path=folder, format=form, cache=False), AdaptConfig(method="lora", rank=8)  # pyright: ignore[reportArgumentType]
    strategy = "fsdp" if ranks > 1 else "single"
    plan = Plan(device="cpu", ranks=ranks, strategy=strategy, dtype="bf16", micro_batch=1, accumulation=1, checkpointing=True)
    found = find_model(model)
    with world("cpu", ranks) as here:
        QuantLinear(512, 8, False, FORMATS[form], 64, torch.bfloat16).encode(torch.randn(8, 512))
        built = skeleton(found.config, model, adapt, plan, here)
        before, started = anonymous(), time.perf_counter()
        with sampled() as most:
            fill(built, open_weights(found), model, adapt, here)
        seconds = time.perf_counter() - started
        tensors = [local_rows(tensor) for tensor in (*built.model.parameters(), *built.model.buffers())]
        own = sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())
        return {"above": most["peak"] - before - own, "left": anonymous() - before - own, "own": own, "seconds": seconds}


def child(folder: str, form: str, ranks: int) -> None:
    from burnish.parallel.launch import launch

    print(json.dumps(list(launch(fill_once, (folder, form, ranks), ranks).values()) if ranks > 1 else [fill_once(folder, form, 1)]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--formats", default="nf4,int8,none")
    parser.add_argument("--ranks", default="1")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="of the files")
    parser.add_argument("--child", nargs=3)
    asked = parser.parse_args()
    if asked.child:
        child(asked.child[0], asked.child[1], int(asked.child[2]))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), asked.layers, {"bf16": torch.bfloat16, "fp32": torch.float32}[asked.dtype])
        for ranks in asked.ranks.split(","):
            for form in asked.formats.split(","):
                command = [sys.executable, sys.argv[0], "--child", folder, form, ranks]
                done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(done.stderr)
                for rank, found in enumerate(json.loads(done.stdout.splitlines()[-1])):
                    verdict = "reached" if found["above"] <= TO_REACH else "NOT reached"
                    print(
                        f"{form:6} rank {rank} of {ranks}: {found['above'] / 2**20:6.0f} MiB above its own {found['own'] / 2**20:.0f} MiB "
                        f"at most, {found['left'] / 2**20:.0f} left; {found['seconds']:.1f} s; to reach {TO_REACH >> 20}: {verdict}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
