"""One GPU: planned against measured, and useful FLOPs, for whole models. Published shapes, random weights.

    python benchmarks/on_gpu.py                       # each row in a process of its own, which loads, plans and trains as a run does
    python benchmarks/on_gpu.py --rows "8B QDoRA" …

The same models beside peft: gpu_peft.py.

Weights are drawn on the GPU while the model is filled, and quantized as a file's would be; contexts are one sample, every token of it
supervised. torch's allocator is capped at what was planned, so that a plan which is too low ends its run: every row that is printed fitted.

Planned: the plan's own phases for this machine (with as little memory as a row says). Measured: what torch allocated and reserved at most.
Seconds are medians of the steps after two. Share of the peak: useful FLOPs (flops.py) a second against bf16 products of the same shapes
alone in this process.
"""

import argparse
import fcntl
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

RANK = 64
ONE, EIGHT, SEVENTY = "meta-llama/Llama-3.2-1B", "meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-70B"
ROWS: dict[str, dict[str, Any]] = {
    "8B QDoRA": {"model": {"path": EIGHT}, "plan": {"checkpointing": "none"}},
    "8B QDoRA, recomputed": {"model": {"path": EIGHT}, "plan": {"checkpointing": "layers"}},
    "8B QLoRA, recomputed": {"model": {"path": EIGHT}, "adapt": {"method": "lora"}, "plan": {"checkpointing": "layers"}},
    "8B QDoRA hqq4, recomputed": {"model": {"path": EIGHT, "format": "hqq", "bits": 4}, "plan": {"checkpointing": "layers"}},
    "8B QDoRA int4, recomputed": {"model": {"path": EIGHT, "format": "int4"}, "plan": {"checkpointing": "layers"}},
    "8B expand, recomputed": {
        "model": {"path": EIGHT},
        "adapt": {"method": "expand", "new_blocks": 4},
        "plan": {"checkpointing": "layers"},
    },
    "1B full": {"model": {"path": ONE, "format": "none"}, "adapt": {"method": "full"}},
    "8B QDoRA in 12 GB, as planned": {"model": {"path": EIGHT}, "gb": 12},
    "8B QDoRA in 8 GB, as planned": {"model": {"path": EIGHT}, "gb": 8},
    "70B QDoRA, as planned": {"model": {"path": SEVENTY}, "rank": 16, "context": 2048},
    "70B QDoRA, base on the GPU": {"model": {"path": SEVENTY}, "rank": 16, "plan": {"offload_base": False}},
    "70B QDoRA in 24 GB, as planned": {"model": {"path": SEVENTY}, "rank": 16, "gb": 24, "ram": 64, "steps": 3, "per_step": 2},
    "70B QDoRA in 24 GB, 8192 tokens, as planned": {
        "model": {"path": SEVENTY},
        "rank": 16,
        "gb": 24,
        "ram": 64,
        "context": 8192,
        "steps": 3,
        "per_step": 1,
    },
}
STEPS, CONTEXT, PER_STEP = 4, 2048, 4


class RandomWeights:
    """A reader whose rows are drawn on the GPU when they are asked for."""

    def __init__(self, config: Any) -> None:
        from burnish.load.weights import TensorInfo
        from burnish.model.network import build

        net = build(config, torch.bfloat16)
        self.infos = {name: TensorInfo(tuple(value.shape), torch.bfloat16, 2 * value.numel()) for name, value in net.named_parameters()}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        shape = (stop - start, *self.infos[name].shape[1:])
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)

    def stored_rows(self, name: str, start: int, stop: int) -> dict[str, torch.Tensor]:
        raise AssertionError("nothing is stored in a format")

    def fingerprint(self) -> str:
        return "random"


def config_of(row: dict[str, Any]) -> Any:
    from burnish.toml import parse_config

    model = {"cache": False} | row["model"]
    rank = row.get("rank", RANK)
    adapt = {"rank": rank, "alpha": 2.0 * rank} if row.get("adapt", {}).get("method", "dora") in ("lora", "dora") else {}
    pins = dict(row.get("plan", {}))
    pins |= {"device_gb": row["gb"]} if "gb" in row else {}
    pins |= {"host_gb": row["ram"]} if "ram" in row else {}
    train = {"rows_per_step": row.get("per_step", PER_STEP), "steps": row.get("steps", STEPS), "log": [], "checkpoint_every": 1000}
    return parse_config(
        {
            "name": "x",
            "model": model,
            "adapt": adapt | row.get("adapt", {}),
            "plan": pins,
            "train": train,
            "data": {"context": row.get("context", CONTEXT)},
            "export": {"writers": []},
        }
    )


def built_of(config: Any, plan: Any, net: Any) -> Any:
    from burnish.parallel.world import alone
    from burnish.skeleton import fill, skeleton

    here, weights = alone("cuda"), RandomWeights(net)
    built = skeleton(net, config.model, config.adapt, plan, here)
    fill(built, weights, config.model, config.adapt, here)  # pyright: ignore[reportArgumentType]
    return built


def planned_row(name: str) -> dict[str, Any]:
    """One process: what it took, and what was planned for it."""
    from burnish.pipeline import decided_for
    from burnish.plan.decide import Prepared
    from burnish.plan.shapes import find_base

    row = ROWS[name]
    config = config_of(row)
    net = find_base(config.model).config
    started = time.perf_counter()
    plan, report = decided_for(config, Prepared(config.train.steps * config.train.rows_per_step, config.data.context))
    planning = time.perf_counter() - started
    with the_gpu_alone():
        return trained_row(name, row, config, net, plan, report, planning)


@contextmanager
def the_gpu_alone() -> Iterator[None]:
    """Rows plan beside each other (imports, and a simulation on one core), and wait here for each other."""
    with (Path(tempfile.gettempdir()) / "burnish-on-gpu.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def trained_row(name: str, row: dict[str, Any], config: Any, net: Any, plan: Any, report: Any, planning: float) -> dict[str, Any]:
    """Loads and trains, with nobody else at the GPU."""
    from burnish.parallel.world import alone
    from burnish.plan.phases import CUDA_CONTEXT
    from burnish.runs import Run
    from burnish.train import run as training

    context, phases = config.data.context, {(phase.name, phase.place): phase for phase in report.phases}
    whole = torch.cuda.get_device_properties(0).total_memory
    planned = max(phase.bytes for phase in report.phases if phase.place == "GPU" and phase.name in ("load", "train step"))
    torch.cuda.set_per_process_memory_fraction((planned - CUDA_CONTEXT) / whole)
    context_only = on_the_card()
    started = time.perf_counter()
    built = built_of(config, plan, net)
    torch.cuda.synchronize()
    loading, load = time.perf_counter() - started, reset_peaks()
    with tempfile.TemporaryDirectory() as folder:
        batches = some_batches(config, plan, net, Path(folder))
        training.train(built, batches, config.train, Run(Path(folder)), alone("cuda"))
        records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    beside = on_the_card() - torch.cuda.memory_reserved()
    step = reset_peaks()
    seconds = statistics.median(record["seconds"] for record in records[2:])
    tokens = config.train.rows_per_step * context
    rate, peak = work_of(built, net, context, tokens), peak_rate(built, context)
    counted = phases["train step", "GPU"]
    return {
        "row": name,
        "plan": {key: getattr(plan, key) for key in ("dtype", "micro_batch", "checkpointing", "checkpoint_every", "offload_base")}
        | {"offload_activations": plan.offload_activations},
        "fits": report.fits,
        "planning": planning,
        "losses": [record["loss"] for record in records],
        "load": {"seconds": loading, **load, "planned": phases["load", "GPU"].bytes},
        "step": {
            "seconds": seconds,
            "all": [record["seconds"] for record in records],
            "planned_seconds": report.step.seconds,  # pyright: ignore[reportOptionalMemberAccess]
            "bound": report.step.bound,  # pyright: ignore[reportOptionalMemberAccess]
            "tokens_per_s": tokens / seconds,
            **step,
            "planned": counted.bytes,
            "parts": {part.name: part.bytes for part in counted.parts},
        },
        "useful_tflops": rate / seconds / 1e12,
        "peak_tflops": peak / 1e12,
        "context": context_only,
        "beside": beside,
    }


def on_the_card() -> int:
    """Bytes of the GPU's memory that this process has, its context and kernels with them, as the driver counts (in MiB)."""
    torch.cuda.synchronize()
    asked = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    lines = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
    return next(int(line.split(",")[1]) << 20 for line in lines if int(line.split(",")[0]) == os.getpid())


def reset_peaks() -> dict[str, int]:
    found = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return found


def some_batches(config: Any, plan: Any, net: Any, folder: Path) -> Any:
    """Random contexts, each one sample, enough for every step."""
    import numpy as np

    from burnish.data.tokens import write_tokens
    from burnish.parallel.world import alone
    from burnish.pipeline import open_batches
    from burnish.runs import Run

    random, context = np.random.default_rng(0), config.data.context
    ids = [random.integers(2, net.vocab_size, context).tolist() for _ in range(config.train.steps * config.train.rows_per_step)]
    samples = ((one, [0] + [1] * (context - 1), (at,)) for at, one in enumerate(ids))
    write_tokens(Run(folder).stage("data") / "tokens" / "train", samples)
    return open_batches(config, plan, Run(folder), alone("cuda"))


def work_of(built: Any, net: Any, context: int, tokens: int) -> float:
    """Useful FLOPs of a step."""
    from flops import Work

    adapters = sum(one.a.numel() + one.b.numel() for one in built.adapters.by_name.values())
    trained = sum(one.numel() for one in built.adapters.trainable().values()) if not adapters else 0
    linears = [(layer.in_features, layer.out_features) for layer in built.linears.values()]
    width = net.num_attention_heads * (getattr(net, "head_dim", None) or net.hidden_size // net.num_attention_heads)
    head = (net.hidden_size, net.vocab_size)
    whole = Work(tokens, linears, adapters or trained, [tokens], head, [context] * (tokens // context), width * net.num_hidden_layers)
    return sum(whole.useful().values())


def peak_rate(built: Any, context: int) -> float:
    """FLOPs a second of bf16 products alone, of the first layer's shapes."""
    shapes = [(layer.in_features, layer.out_features) for name, layer in built.linears.items() if "layers.0." in f"layers.{name}"]
    flops = seconds = 0.0
    for width, out in shapes:
        x, w, g = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for size in ((context, width), (out, width), (context, out)))
        for left, right in ((x, w.T), (g, w)):
            seconds += on_card(lambda left=left, right=right: left @ right)
            flops += 2.0 * context * width * out
    return flops / seconds if seconds else float("nan")


def on_card(what: Any, times: int = 20) -> float:
    """Median seconds by the card's own clock."""
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times + 3)]
    for first, last in pairs:
        first.record()
        what()
        last.record()
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(last) for first, last in pairs[3:]) / 1e3


# --- tables


def child(*words: str, script: str = __file__, seconds: int = 1800, **environment: str) -> dict[str, Any] | None:
    """What a fresh process prints last; None, and its complaint, where it failed."""
    try:
        done = subprocess.run(
            [sys.executable, script, *words], capture_output=True, text=True, timeout=seconds, env=os.environ | environment
        )
    except subprocess.TimeoutExpired:
        print(f"{' '.join(words)} took more than {seconds} s", flush=True)
        return None
    if done.returncode:
        print(f"{' '.join(words)} failed:\n{done.stdout[-500:]}{done.stderr[-3000:]}", flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def planned_table(rows: list[str], log: Path | None) -> None:
    columns = ("", "plan", "allocated, reserved, GB", "planned", "/ reserved", "load: reserved, planned", "load s", "s a step (planned)")
    print(f"| {' | '.join(columns)} | tokens/s | useful of the products' peak |")
    print(f"|{'---|' * (len(columns) + 2)}", flush=True)
    with ThreadPoolExecutor(4) as pool:
        for row, found in zip(rows, pool.map(lambda row: child("--child", row), rows), strict=True):
            if found is not None:
                tell(row, found, log)


def tell(row: str, found: dict[str, Any], log: Path | None) -> None:
    """A row of the table."""
    note(log, found)
    step, load, gb = found["step"], found["load"], 1e9
    planned = step["planned"] - step["parts"].get("CUDA context", 0)
    plan = found["plan"]
    words = [f"{plan['micro_batch']} at a time", f"recomputed /{plan['checkpoint_every']}" if plan["checkpointing"] else "kept"]
    words += ["base on host"] * plan["offload_base"] + ["activations on host"] * plan["offload_activations"]
    print(
        f"| {row} | {', '.join(words)} | {step['allocated'] / gb:.2f}, {step['reserved'] / gb:.2f} | {planned / gb:.2f} "
        f"| {planned / step['reserved']:.2f} | {load['reserved'] / gb:.2f}, {load['planned'] / gb:.2f} | {load['seconds']:.1f} "
        f"| {step['seconds']:.2f} ({step['planned_seconds']:.2f}, {step['bound']}) | {step['tokens_per_s']:.0f} "
        f"| {found['useful_tflops']:.0f} of {found['peak_tflops']:.0f} TFLOP/s |",
        flush=True,
    )


def note(log: Path | None, found: dict[str, Any]) -> None:
    """One process's whole numbers, where they are kept."""
    if log:
        with log.open("a") as file:
            file.write(json.dumps(found) + "\n")


def command_line(about: str | None, names: Collection[str]) -> argparse.ArgumentParser:
    """What both scripts for a GPU are asked."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", choices=names)
    parser.add_argument("--rows", nargs="*", default=list(names), choices=names)
    parser.add_argument("--log", type=Path, help="a file for each process's whole numbers")
    return parser


def main() -> None:
    parser = command_line(__doc__, ROWS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(planned_row(asked.child)))
        return
    print(card(), flush=True)
    planned_table(asked.rows, asked.log)


def card() -> str:
    found = torch.cuda.get_device_properties(0)
    return f"{found.name}, {found.total_memory / 1e9:.1f} GB, torch {torch.__version__}, CUDA {torch.version.cuda}"


if __name__ == "__main__":
    main()
