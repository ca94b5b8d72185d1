"""How much of this machine's own matmul speed a training step of SmolLM2 uses: useful FLOPs a second against the peak at the same shapes.

CPU, fp32, NF4, rank 64, six targets, packed question/answer rows of which the answers are trained, no checkpointing, AdamW.
Useful FLOPs of a step, counted from the model's shapes and the batch:

    frozen      4 · T · Σ in·out        of every linear layer of the decoder: W x, and gᵀ W for the input's gradient
    adapters    6 · T · Σ r·(in + out)  of the six targets: each of A and B once forward, twice backward
    head        4 · K · H · V           on the K supervised positions: the logits, and the gradient of the hidden states
    attention   12 · Σ L(L+1)/2 · D     a layer, over samples of L tokens, for D = heads · head width: Q Kᵀ and P V forward, four more
                                        such products backward, on the causal half alone

Nothing that is done twice, decoded, normalized or rotated is counted, nor DoRA's norm. The peak: the same frozen products and the head's,
alone, in this process, their operands ready, the best of several times each; their FLOPs divided by their time.
Run: python benchmarks/flops.py ROWS.jsonl [--only 2048] [--pairs 5] [--steps 5]
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

GOAL = 0.70
SIDES = [(method, context) for context in (2048, 512) for method in ("dora", "lora")]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", help="JSONL with `question` and `answer`")
    parser.add_argument("--pairs", type=int, default=5, help="processes of each side")
    parser.add_argument("--steps", type=int, default=5, help="timed steps in each process, after two that are not")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="sides whose name holds this: dora, lora, 2048, 512")
    parser.add_argument("--child")
    asked = parser.parse_args()
    if asked.child:
        method, context = asked.child.split("-")
        print(json.dumps(measure(asked, method, int(context))))
        return
    print(json.dumps(machine(asked.threads)), flush=True)
    names = [name for name in (f"{method}-{context}" for method, context in SIDES) if asked.only in name]
    given = [sys.executable, sys.argv[0], asked.rows, "--steps", str(asked.steps), "--threads", str(asked.threads)]
    each = rounds({name: [*given, "--child", name] for name in names}, asked.pairs, asked.threads)
    print("| | s a step | tokens/s | useful GFLOP: frozen, adapters, head, attention | GFLOP/s | peak GFLOP/s | of the peak | memory |")
    print("|---|---|---|---|---|---|---|---|")
    for name in names:
        seconds, tokens, rate, peak, share, memory = (
            statistics.median(results[name][key] for results in each)
            for key in ("seconds", "tokens", "rate", "peak_rate", "share", "peak_bytes")
        )
        counts = ", ".join(f"{value / 1e9:.0f}" for value in each[0][name]["useful"].values())
        shares = [results[name]["share"] for results in each]
        print(
            f"| Q{name.replace('-', ', ')} tokens | {seconds:.2f} | {tokens / seconds:.0f} | {counts} | {rate / 1e9:.0f} "
            f"| {peak / 1e9:.0f} | **{share:.3f}** ({min(shares):.3f} to {max(shares):.3f}) | {memory / 1e9:.2f} GB |"
        )
        if name.endswith("2048"):
            print(f"Q{name}: to reach {GOAL}: {'reached' if share >= GOAL else 'NOT reached'}", file=sys.stderr)


def measure(asked: argparse.Namespace, method: str, context: int) -> dict[str, Any]:
    """Steps of one process, and the peak of its products."""
    import torch

    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as folder:
        built, batch, step = ready(asked, method, context, Path(folder))
        seconds = []
        for _ in range(asked.steps + 2):
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
    useful = useful_flops(built, batch)
    peak_rate = matmul_rate(built, batch)
    median = statistics.median(seconds[2:])
    rate = sum(useful.values()) / median
    return {
        "seconds": median,
        "tokens": batch.ids.shape[1],
        "useful": useful,
        "rate": rate,
        "peak_rate": peak_rate,
        "share": rate / peak_rate,
        "peak_bytes": peak_bytes(),
    }


def ready(asked: argparse.Namespace, method: str, context: int, folder: Path) -> tuple[Any, Any, Any]:
    """The model in its place, a packed context, and what makes one step on it."""
    from our_side import config_of
    from our_side import parser as parser_of_ours

    from burnish import pipeline
    from burnish.load.pretrained import find_model
    from burnish.load.weights import open_weights
    from burnish.model.network import packed
    from burnish.parallel.world import alone
    from burnish.runs import open_run
    from burnish.skeleton import fill, skeleton
    from burnish.train.optimizer import build
    from burnish.train.step import take_step

    words = ["--rows", asked.rows, "--count", str(30 * context // 512), "--context", str(context), "--method", method]
    config = config_of(parser_of_ours().parse_args([*words, "--checkpointing", "none", "--micro-batch", "1"]), folder)
    run, here = open_run(folder, "flops"), alone("cpu")
    pipeline.prepare(config, run)
    plan = pipeline.plan(config, run)
    found = find_model(config.model)
    built = skeleton(found.config, config.model, config.adapt, plan, here)
    fill(built, open_weights(found), config.model, config.adapt, here)
    built.model.train()
    step = pipeline.open_batches(config, plan, run, here).step(0)
    update = build(built.adapters.trainable(), config.train)

    def one() -> None:
        with packed(built.model):
            take_step(built, None, step, update, config.train.clip, here, str)

    return built, step.micro_batches[0], one


def useful_flops(built: Any, batch: Any) -> dict[str, float]:
    """By part: see the formula above."""
    config, tokens = built.model.config, batch.ids.shape[1]
    width = config.num_attention_heads * config.head_dim
    lengths = [stop - start for start, stop in zip(batch.segments, batch.segments[1:], strict=False)]
    adapted = built.adapters.by_name.values()
    return {
        "frozen": 4.0 * tokens * sum(layer.in_features * layer.out_features for layer in built.linears.values()),
        "adapters": 6.0 * tokens * sum(one.a.numel() + one.b.numel() for one in adapted),
        "head": 4.0 * len(batch.targets) * config.hidden_size * config.vocab_size,
        "attention": 12.0 * sum(length * (length + 1) / 2 for length in lengths) * width * config.num_hidden_layers,
    }


def matmul_rate(built: Any, batch: Any, times: int = 7) -> float:
    """FLOPs a second of the frozen products and the head's, forward and backward, as they come in a step, each at its best of `times`."""
    import torch

    from burnish.model.head import chunk
    from burnish.model.network import head_of

    tokens, head = batch.ids.shape[1], head_of(built.model)
    pieces = batch.targets.split(chunk(head))
    shapes = [(tokens, layer.in_features, layer.out_features) for layer in built.linears.values()]
    shapes += [(len(piece), head.in_features, head.out_features) for piece in pieces]
    flops = seconds = 0.0
    for shape in set(shapes):
        rows, width, out = shape
        x, w, g = torch.randn(rows, width), torch.randn(out, width), torch.randn(rows, out)
        for left, right in ((x, w.T), (g, w)):
            result = left @ right
            seconds += shapes.count(shape) * min(_seconds(left, right, result) for _ in range(times))
            flops += shapes.count(shape) * 2.0 * rows * width * out
    return flops / seconds


def _seconds(left: Any, right: Any, result: Any) -> float:
    import torch

    started = time.perf_counter()
    torch.mm(left, right, out=result)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
