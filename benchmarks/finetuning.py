"""A whole finetuning of SmolLM2 on question/answer rows, burnish against TRL's SFTTrainer: supervised tokens a second, and peak memory.

Both sides: NF4 base, QDoRA (or `--method lora`), rank 64, six targets, fp32, the same rows, weights, chat template and learning rate,
AdamW, one pass, each run a fresh process. Seconds are those of the training loop, its first step and its logging included, on either side;
`whole` is the process from its start to its end: imports, reading, quantizing, tokenizing too. TRL's sides:

    trl                  as its documentation sets it up: batch 4, padded, gradient checkpointing (its default)
    trl, kept            the same without checkpointing
    trl, packing         as its documentation makes it fastest: packing (rows end to end, --context tokens a step), no checkpointing

Run: python benchmarks/finetuning.py ROWS.jsonl --trl TRL/bin/python [--count 32] [--pairs 5]. TRL's environment: see trl_side.py.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from side_by_side import compare, machine, rounds

HERE = Path(__file__).parent
TRL = {"trl": ["--checkpointing"], "trl, kept": [], "trl, packing": ["--packing"]}
GOALS = {"trl": 2.0, "trl, kept": 2.0, "trl, packing": 1.7}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", help="JSONL with `question` and `answer`")
    parser.add_argument("--trl", required=True, help="the Python of TRL's environment")
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--method", choices=["dora", "lora"], default="dora")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="TRL's sides whose name holds this")
    asked = parser.parse_args()
    print(json.dumps(machine(asked.threads)), flush=True)
    given = ["--rows", asked.rows, "--count", str(asked.count), "--context", str(asked.context), "--method", asked.method]
    given += ["--threads", str(asked.threads)]
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder))
        sides = {"burnish": [sys.executable, str(HERE / "our_side.py"), "--model", folder, *given]}
        for name, more in TRL.items():
            if asked.only in name:
                sides[name] = [asked.trl, str(HERE / "trl_side.py"), "--model", folder, *given, *more]
        each = rounds(sides, asked.pairs, asked.threads)
    for results in each:
        for result in results.values():
            result["rate"] = result["supervised"] / result["seconds"]
            result["whole_rate"] = result["supervised"] / result["wall_seconds"]
    print(json.dumps(next((each[0][name]["versions"] for name in TRL if name in each[0]), {})))
    print("| | supervised tokens/s | of the whole process | steps | supervised of places | peak | loss |\n|---|---|---|---|---|---|---|")
    for name, first in each[0].items():
        rate, whole, peak = (statistics.median(results[name][key] for results in each) for key in ("rate", "whole_rate", "peak_bytes"))
        losses = " → ".join(f"{loss:.3f}" for loss in first["losses"])
        print(
            f"| {name} | {rate:.1f} | {whole:.1f} | {first['steps']} | {first['supervised']:,} of {first['places']:,} "
            f"| {peak / 1e9:.2f} GB | {losses} |"
        )
    for name in each[0].keys() - {"burnish"}:
        compare(f"burnish / {name}, supervised tokens/s", each, "burnish", name, "rate", GOALS[name], at_least=True)
        compare(f"burnish / {name}, the whole process", each, "burnish", name, "whole_rate", 1.0, at_least=True)


def write_folder(folder: Path) -> None:
    """SmolLM2's weights in fp32 as a folder of transformers, with the template that burnish's side uses."""
    from our_side import SMOLLM2
    from safetensors.torch import save_file

    from burnish.config import ModelConfig
    from burnish.data.template import TEMPLATES
    from burnish.load.pretrained import find_model, read_tokenizer
    from burnish.load.weights import open_weights

    found = find_model(ModelConfig(path=SMOLLM2))
    weights = open_weights(found)
    tensors = {name: weights.rows(name, 0, info.shape[0]).float().contiguous() for name, info in weights.infos.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found.config.save_pretrained(folder)
    tokenizer = read_tokenizer(found)
    tokenizer.chat_template = TEMPLATES["chatml"]
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
