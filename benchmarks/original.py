"""fsdp_qlora's printed commands, run by this repository's train.py on SmolLM2: every train type, on one rank and on two.

The command of the QDoRA article (and for block expansion its two commands) as they are printed, with another model, data set, output folder
and logger, and the shorter values that the arguments below give. Each is a fresh process of two threads, or of two ranks with a thread each
(`--world_size 2`). A table of wall time (the whole process), tokens a second in the loop, peak resident memory (of the largest process),
the loss of the first and the last step, and the exact match (by the last number) on held-out questions, which a further process answers.
Quantized weights are kept between the runs of a table, in a cache of its own: the first run of a format quantizes, the next ones read.

    python benchmarks/original.py GSM8K/train.jsonl --questions GSM8K/test.jsonl
    python benchmarks/original.py alpaca.json --count 60 --types bnb_dora,qlora

Rows with `instruction` are given as `--dataset alpaca=FILE`, others as `--dataset FILE`.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from our_side import SMOLLM2
from side_by_side import Result, machine, run

ROOT = Path(__file__).parents[1]
PRINTED = shlex.split(
    """--train_type bnb_dora --model_name meta-llama/Llama-2-7b-hf --dataset orca_math --dataset_samples 10000 --batch_size 4
    --context_length 2048 --gradient_accumulation_steps 2 --sharding_strategy full_shard --use_gradient_checkpointing true
    --reentrant_checkpointing true --use_cpu_offload false --use_activation_cpu_offload false --log_to wandb
    --project_name "fsdp-quantized-ft-exps" --save_model true --output_dir models/llama-7b-orca-math-10k-bnb-QDoRA"""
)
EXPANSION = shlex.split("--model_name meta-llama/Llama-2-7b-hf --output_dir llama_pro --expansion_rate 0.1")
TYPES = (
    *("full", "lora", "custom_lora", "qlora", "custom_qlora", "hqq_lora", "bnb_dora", "hqq_dora"),
    *("bnb_llama_pro", "hqq_llama_pro"),
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path, help="JSONL or JSON of rows to train on")
    parser.add_argument("--questions", type=Path, help="JSONL with `question` and `answer`; of its first rows the last number is compared")
    parser.add_argument("--count", type=int, default=24, help="the first so many rows")
    parser.add_argument("--asked", type=int, default=12, help="the first so many questions")
    parser.add_argument("--new-tokens", type=int, default=160)
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--context", default="512")
    parser.add_argument("--batch", default="1", help="contexts in a micro-batch of a rank; with two ranks a step has twice as many")
    parser.add_argument("--accumulation", default="2", help="micro-batches in a step of one rank; of two ranks half as many")
    parser.add_argument("--epochs", default="1")
    parser.add_argument("--precision", default="fp32", help="the printed commands leave it at bf16, which few CPUs compute in")
    parser.add_argument("--lr", default="1e-5", help="1e-5 is the original's default, which the printed commands leave as it is")
    parser.add_argument("--child", type=Path, help="answers the questions with the model of this run")
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(answered(asked)))
        return
    print(json.dumps(machine(2)), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["BURNISH_CACHE"] = f"{folder}/cache"
        table(asked, Path(folder))


def table(asked: argparse.Namespace, folder: Path) -> None:
    dataset = first_rows(asked.rows, asked.count, folder)
    kinds = asked.types.split(",")
    expanded = folder / "llama_pro"
    if any(kind.endswith("llama_pro") for kind in kinds):
        words = put(EXPANSION, {"--model_name": asked.model, "--output_dir": str(expanded)})
        done = run([sys.executable, str(ROOT / "scripts/block_expansion.py"), *words], 2)
        expanded = next(folder.glob("llama_pro*"))
        print(f"scripts/block_expansion.py {' '.join(EXPANSION)}: {done['wall_seconds']:.0f} s, {expanded.name}", flush=True)
    print(f"python train.py {' '.join(PRINTED)}\nwith other values for: {', '.join(changes(asked, '', 1, folder, dataset, expanded))}\n")
    print("| train type | ranks | wall | tokens/s | peak memory | steps | loss | exact match | of the base |")
    print("|---|---|---|---|---|---|---|---|---|")
    for kind in kinds:
        for ranks in map(int, asked.ranks.split(",")):
            words = put(PRINTED, changes(asked, kind, ranks, folder, dataset, expanded))
            done = run([sys.executable, str(ROOT / "train.py"), *words], 2 // ranks)
            print(line(kind, ranks, done, Path(words[words.index("--output_dir") + 1]), asked), flush=True)


def changes(asked: argparse.Namespace, kind: str, ranks: int, folder: Path, dataset: str, expanded: Path) -> dict[str, str]:
    """What is put over the printed command. A step has as many contexts on two ranks as on one."""
    values = {
        "--train_type": kind,
        "--model_name": asked.model,
        "--dataset": dataset,
        "--batch_size": asked.batch,
        "--context_length": asked.context,
        "--gradient_accumulation_steps": str(max(1, int(asked.accumulation) // ranks)),
        "--num_epochs": asked.epochs,
        "--precision": asked.precision,
        "--lr": asked.lr,
        "--log_to": "stdout",
        "--output_dir": str(folder / f"{kind}-{ranks}"),
        "--world_size": str(ranks),
    }
    return values | ({"--llama_pro_path": str(expanded)} if kind.endswith("llama_pro") else {})


def put(printed: list[str], values: dict[str, str]) -> list[str]:
    """The words of a command with other values; an argument that it has not is added."""
    words = list(printed)
    for name, value in values.items():
        if name in words:
            words[words.index(name) + 1] = value
        else:
            words += [name, value]
    return words


def first_rows(file: Path, count: int, folder: Path) -> str:
    """What `--dataset` is given: a copy of the first rows."""
    text = file.read_text(encoding="utf-8")
    rows = json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    copy = folder / "rows.jsonl"
    copy.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]), encoding="utf-8")
    return f"alpaca={copy}" if "instruction" in rows[0] else str(copy)


def line(kind: str, ranks: int, done: Result, folder: Path, asked: argparse.Namespace) -> str:
    """A row of the table."""
    steps = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    rate = sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps)
    match = base = "-"
    if asked.questions:
        given = ["--questions", str(asked.questions), "--asked", str(asked.asked), "--new-tokens", str(asked.new_tokens)]
        child = [sys.executable, __file__, str(asked.rows), *given, "--child", str(folder)]
        right = run(child, 2)
        match = f"{right['tuned']} of {right['asked']}"
        base = f"{right['base']} of {right['asked']}" if "base" in right else "-"
    return (
        f"| {kind} | {ranks} | {done['wall_seconds']:.0f} s | {rate:.0f} | {done['peak_bytes'] / 1e9:.2f} GB | {len(steps)} "
        f"| {steps[0]['loss']:.4f} → {steps[-1]['loss']:.4f} | {match} | {base} |"
    )


def answered(asked: argparse.Namespace) -> dict[str, Any]:
    """How many of the questions the run's model answers rightly; of qlora on one rank, its base too."""
    import torch

    from burnish.evaluate.compare import adapters_off
    from burnish.evaluate.generate import generate
    from burnish.evaluate.number import number_match
    from burnish.pipeline import load

    torch.set_num_threads(2)
    built, template = load(asked.child)
    rows = [json.loads(text) for text in asked.questions.read_text(encoding="utf-8").splitlines()[: asked.asked]]

    def right() -> int:
        answers = generate(built, template, [row["question"] for row in rows], asked.new_tokens, len(rows))
        return sum(number_match(answer, row["answer"]) for answer, row in zip(answers, rows, strict=True))

    counts = {"asked": len(rows), "tuned": right()}
    if asked.child.name == "qlora-1":
        with adapters_off(built):
            counts["base"] = right()
    return counts


if __name__ == "__main__":
    main()
