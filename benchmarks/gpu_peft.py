"""A whole step of Llama-3-8B's shape on one GPU, burnish and peft + bitsandbytes in turn: NF4, bf16, one context of 2,048 tokens.

    python benchmarks/gpu_peft.py [--rounds 3] [--rows burnish-dora-kept peft-dora-kept …]

Random weights, every token supervised, AdamW, rank 64 on seven linear layers; activations kept, or every layer recomputed. Seconds are
medians of five steps after two; held is what is allocated before the first, most what is at its fullest.
"""

import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from layer import peft_model
from on_gpu import CONTEXT, EIGHT, built_of, card, child, command_line, config_of, note, reset_peaks

ALLOCATOR = {"burnish": {}, "peft": {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}}
"""torch's own default for peft's side, which importing burnish would change."""
SIDES = [f"{side}-{method}-{kept}" for method in ("dora", "lora") for kept in ("kept", "recomputed") for side in ("burnish", "peft")]


def side(name: str) -> dict[str, Any]:
    who, method, kept = name.split("-")
    step = (ours if who == "burnish" else theirs)(method, kept == "recomputed")
    held = reset_peaks()["allocated"], torch.cuda.memory_allocated()
    seconds = []
    for _ in range(7):
        torch.cuda.synchronize()
        started = time.perf_counter()
        loss = step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    peaks = reset_peaks()
    median = statistics.median(seconds[2:])
    return {"seconds": median, "loss": float(loss), "held": held[1], "tokens_per_s": CONTEXT / median, **peaks}


def ours(method: str, recomputed: bool) -> Any:
    from burnish.config import Plan
    from burnish.data.batches import Step, on_device
    from burnish.model.network import packed
    from burnish.parallel.world import alone
    from burnish.plan.shapes import find_base
    from burnish.plan.trace import worst_batch
    from burnish.train.optimizer import build
    from burnish.train.step import take_step

    config = config_of({"model": {"path": EIGHT}, "adapt": {"method": method, "targets": list(ADAPTED)}})
    plan = Plan(device="cuda", ranks=1, strategy="single", dtype="bf16", micro_batch=1, accumulation=1, checkpointing=recomputed)
    built = built_of(config, plan, find_base(config.model).config)
    built.model.train()
    update, batch = build(built.adapters.trainable(), config.train), on_device(worst_batch(CONTEXT - 1, 1), torch.device("cuda"))

    def step() -> float:
        with packed(built.model):
            return take_step(built, None, Step((batch,), len(batch.targets), 1), update, 1.0, alone("cuda"), str).loss

    return step


ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def theirs(method: str, recomputed: bool) -> Any:
    """As TRL and the QLoRA recipe set it up: NF4, bf16 autocast, adapters in fp32, AdamW."""
    from transformers import AutoModelForCausalLM

    from burnish.config import ModelConfig
    from burnish.plan.shapes import find_base

    net = find_base(ModelConfig(path=EIGHT)).config
    with torch.device("cuda"):
        network = AutoModelForCausalLM.from_config(net, dtype=torch.bfloat16, attn_implementation="sdpa")
    model = peft_model(network, method == "dora", torch.bfloat16, "cuda", ADAPTED).train()
    if recomputed:
        network.gradient_checkpointing_enable({"use_reentrant": False})
        network.enable_input_require_grads()
    gc.collect()
    torch.cuda.empty_cache()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    update = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.zeros(1, CONTEXT, dtype=torch.int64, device="cuda")

    def step() -> float:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        update.step()
        update.zero_grad(set_to_none=True)
        return loss.item()

    return step


def peft_table(rounds: int, names: list[str], log: Path | None) -> None:
    each: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            found = child("--child", name, script=__file__, **ALLOCATOR[name.partition("-")[0]])
            if found is not None:
                each[name].append(found)
                note(log, {"side": name} | found)
    print("| | s a step | tokens/s | held, GB | most, GB |\n|---|---|---|---|---|")
    for name, found in each.items():
        if found:
            middle = {key: statistics.median(one[key] for one in found) for key in ("seconds", "tokens_per_s", "held", "allocated")}
            spread = f"{min(one['seconds'] for one in found):.3f} to {max(one['seconds'] for one in found):.3f}"
            print(
                f"| {name} | {middle['seconds']:.3f} ({spread}) | {middle['tokens_per_s']:.0f} | {middle['held'] / 1e9:.2f} "
                f"| {middle['allocated'] / 1e9:.2f} |",
                flush=True,
            )


def main() -> None:
    parser = command_line(__doc__, SIDES)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(side(asked.child)))
        return
    print(card(), flush=True)
    peft_table(asked.rounds, asked.rows, asked.log)


if __name__ == "__main__":
    main()
