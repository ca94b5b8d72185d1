"""What the plan gives for models that others have published figures of, and for 70B on two GPUs of 24 GB: the tables of docs/planning.md.

Nothing is loaded or downloaded, and no GPU is needed; some minutes. Run: python benchmarks/published.py [--only 70b]
"""

import argparse
from typing import Any

TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
QLORA = {"method": "lora", "rank": 64, "targets": TARGETS}
QDORA = {"method": "dora", "rank": 16}
LAYERS = {"checkpointing": "layers", "checkpoint_every": 1, "offload_base": False, "offload_activations": False}
FSDP = LAYERS | {"strategy": "fsdp", "ranks": 2}


def case(
    model: str, adapt: dict[str, Any], plan: dict[str, Any], batch: int = 1, context: int = 2048, ends: str = "none"
) -> dict[str, Any]:
    """Sections of a config: `batch` contexts on each of two GPUs."""
    return {
        "name": "published",
        "model": {"path": model, "double_quantized": True, "ends": ends},
        "adapt": adapt,
        "data": {"context": context},
        "train": {"rows_per_step": 2 * batch},
        "plan": plan | {"micro_batch": batch},
    }


HOST = {"offload_activations": True}
CASES = {
    "Llama-2-7B QLoRA, FSDP, 1 row": case("llama-2-7b", QLORA, FSDP),
    "Llama-2-7B QLoRA, FSDP, 10 rows": case("llama-2-7b", QLORA, FSDP, 10),
    "Llama-2-7B QLoRA, DDP, 8 rows": case("llama-2-7b", QLORA, FSDP | {"strategy": "ddp"}, 8),
    "Yi-34B QLoRA, FSDP, 2 rows": case("yi-34b", QLORA, FSDP, 2),
    "Llama-2-70B QLoRA, FSDP, base on host, 2 rows": case("llama-2-70b", QLORA, FSDP | {"offload_base": True}, 2),
    "Llama-2-70B QLoRA, one GPU, base on host, 2 rows": case(
        "llama-2-70b", QLORA, FSDP | {"offload_base": True, "strategy": "single", "ranks": 1}, 2
    ),
    "Llama-2-70B QLoRA, FSDP, 2 rows": case("llama-2-70b", QLORA, FSDP, 2),
    "Llama-3-70B QDoRA rank 16, FSDP, 1 row": case("llama-3-70b", QDORA, FSDP),
    "Llama-2-70B QLoRA rank 8, FSDP, 1 row": case("llama-2-70b", {"method": "lora", "rank": 8}, FSDP),
}
CASES |= {
    f"{model} QDoRA, FSDP, ends {ends}, context {context}, activations on {'host' if more else 'GPU'}": case(
        model, QDORA, FSDP | more, context=context, ends=ends
    )
    for model, ends, context, more in (
        ("llama-3-70b", "none", 1024, HOST),
        ("llama-3-70b", "nf4", 512, {}),
        ("llama-3-70b", "nf4", 1024, {}),
        ("llama-3-70b", "nf4", 1024, HOST),
        ("llama-3-70b", "nf4", 2048, {}),
        ("llama-3-70b", "nf4", 2048, HOST),
        ("llama-2-70b", "none", 2048, {}),
        ("llama-2-70b", "none", 2048, HOST),
        ("llama-2-70b", "nf4", 1024, {}),
        ("llama-2-70b", "nf4", 2048, HOST),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    asked = parser.parse_args()
    print("| | a GPU, GiB | to spare of 24 GiB | host memory of a process, GiB | most of it on a GPU |\n|---|---|---|---|---|")
    for name, sections in CASES.items():
        if asked.only.lower() in name.lower():
            print(row(name, sections), flush=True)


def row(name: str, sections: dict[str, Any]) -> str:
    from burnish import pipeline
    from burnish.plan.machine import imagined_machine
    from burnish.plan.shapes import hub_id
    from burnish.toml import parse_config

    sections["model"]["path"] = hub_id(sections["model"]["path"])
    _, report = pipeline.decided_for(parse_config(sections, "published"), None, imagined_machine("2x24GiB", "1000GB"))
    step = {phase.place: phase for phase in report.phases if phase.name == "train step"}
    device, host = step["GPU"], step["memory"]
    parts = sorted(device.parts, key=lambda part: -part.bytes)
    most = ", ".join(f"{part.name} {part.bytes / 2**30:.2f}" for part in parts if part.bytes >= 0.2 * 2**30)
    spare = (device.limit_bytes - device.bytes) / 2**30
    return f"| {name} | {device.bytes / 2**30:.2f} | {spare:.2f} | {host.bytes / 2**30:.1f} | {most} |"


if __name__ == "__main__":
    main()
