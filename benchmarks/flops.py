"""How much of this machine's own matmul speed a training step uses: useful FLOPs a second against the peak at the same shapes.

CPU, fp32, NF4, rank 64, six targets, no checkpointing, AdamW. `smollm2`: the whole model, packed question/answer rows of which the answers
are trained. `layer`: one decoder layer of Llama-3-8B's shape, one sample.
Useful FLOPs of a step, counted from the shapes and the batch:

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from side_by_side import machine, peak_bytes, rounds, timed

GOAL = 0.70
SIDES = [f"{method}-{shape}-{tokens}" for shape in ("smollm2", "layer") for tokens in (2048, 512) for method in ("dora", "lora")]


@dataclass(frozen=True)
class Work:
    """What a step multiplies."""

    tokens: int
    linears: list[tuple[int, int]]
    """in, out of every frozen linear layer."""
    adapter_weights: int
    supervised: list[int]
    """Supervised positions, a number for each product with the head."""
    head: tuple[int, int]
    """H, V."""
    samples: list[int]
    """Tokens of each."""
    attention_width: int
    """Heads times their width, over all layers."""

    def useful(self) -> dict[str, float]:
        """FLOPs by part: see the formula above."""
        return {
            "frozen": 4.0 * self.tokens * sum(width * out for width, out in self.linears),
            "adapters": 6.0 * self.tokens * self.adapter_weights,
            "head": 4.0 * sum(self.supervised) * self.head[0] * self.head[1],
            "attention": 12.0 * sum(length * (length + 1) / 2 for length in self.samples) * self.attention_width,
        }

    def products(self) -> list[tuple[int, int, int]]:
        """Rows, width, outputs of the frozen products and the head's."""
        return [(self.tokens, *shape) for shape in self.linears] + [(count, *self.head) for count in self.supervised]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", help="JSONL with `question` and `answer`")
    parser.add_argument("--pairs", type=int, default=5, help="processes of each side")
    parser.add_argument("--steps", type=int, default=5, help="timed steps in each process, after two that are not")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="sides whose name holds this: dora, lora, smollm2, layer, 2048, 512")
    parser.add_argument("--child")
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(measure(asked, *asked.child.split("-"))))
        return
    print(json.dumps(machine(asked.threads)), flush=True)
    names = [name for name in SIDES if asked.only in name]
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


def measure(asked: argparse.Namespace, method: str, shape: str, tokens: str) -> dict[str, Any]:
    """Steps of one process, and the peak of its products."""
    import torch

    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as folder:
        work, step = of_a_layer(method, int(tokens)) if shape == "layer" else of_smollm2(asked, method, int(tokens), Path(folder))
        seconds = timed(step, asked.steps + 2)
    memory, peak_rate, median = peak_bytes(), matmul_rate(work.products()), statistics.median(seconds[2:])
    useful = work.useful()
    rate = sum(useful.values()) / median
    return {
        "seconds": median,
        "tokens": work.tokens,
        "useful": useful,
        "rate": rate,
        "peak_rate": peak_rate,
        "share": rate / peak_rate,
        "peak_bytes": memory,
    }


def of_a_layer(method: str, tokens: int) -> tuple[Work, Any]:
    """One decoder layer of Llama-3-8B's shape, and its step."""
    from layer import LLAMA3_8B, RANK, our_layer

    hidden, inner, heads, groups = (
        LLAMA3_8B[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    few = hidden // heads * groups
    output, adapted = [(hidden, hidden)], [(hidden, hidden), *[(hidden, few)] * 2, *[(hidden, inner)] * 2, (inner, hidden)]
    weights = RANK * sum(width + out for width, out in adapted)
    return Work(tokens, output + adapted, weights, [], (0, 0), [tokens], hidden), our_layer(method, tokens=tokens)


def of_smollm2(asked: argparse.Namespace, method: str, context: int, folder: Path) -> tuple[Work, Any]:
    """The whole model, a packed context, and what makes a step on it."""
    from burnish.model.head import chunk
    from burnish.model.network import head_of

    built, batch, step = ready(asked, method, context, folder)
    config, head = built.model.config, head_of(built.model)
    work = Work(
        tokens=batch.ids.shape[1],
        linears=[(layer.in_features, layer.out_features) for layer in built.linears.values()],
        adapter_weights=sum(one.a.numel() + one.b.numel() for one in built.adapters.by_name.values()),
        supervised=[len(piece) for piece in batch.targets.split(chunk(head))],
        head=(head.in_features, head.out_features),
        samples=[stop - start for start, stop in zip(batch.segments, batch.segments[1:], strict=False)],
        attention_width=config.num_attention_heads * config.head_dim * config.num_hidden_layers,
    )
    return work, step


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


def matmul_rate(shapes: list[tuple[int, int, int]], times: int = 7) -> float:
    """FLOPs a second of products of these shapes, forward and backward, each at its best of `times`."""
    import torch

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
