"""What command lines of the original become: what several tests expect, and how they ask for it."""

import shlex
from typing import Any

from burnish.compat.arguments import parse
from burnish.compat.translate import Translation, translate

SIX = ["k_proj", "q_proj", "v_proj", "up_proj", "down_proj", "gate_proj"]
NF4 = {"model.format": "nf4", "model.block": 64, "model.double_quantized": True}
HQQ = {"model.format": "hqq", "model.block": 64, "model.bits": 4}
LORA = {"adapt.method": "lora", "adapt.rank": 64, "adapt.alpha": 16.0, "adapt.dropout": 0.1, "adapt.targets": SIX}
DORA = {"adapt.method": "dora", "adapt.start": "normal", "adapt.rank": 64, "adapt.alpha": 64.0, "adapt.dropout": 0.0, "adapt.targets": SIX}
PRO = {"adapt.method": "expand", "adapt.new_blocks": 3}
OF_TYPE = {
    "full": {"model.format": "none", "adapt.method": "full", "plan.offload_base": False},
    "lora": {"model.format": "none"} | LORA,
    "custom_lora": {"model.format": "none"} | LORA,
    "qlora": NF4 | LORA,
    "custom_qlora": NF4 | LORA,
    "hqq_lora": HQQ | LORA,
    "bnb_dora": NF4 | DORA,
    "hqq_dora": HQQ | DORA,
    "bnb_llama_pro": NF4 | PRO,
    "hqq_llama_pro": HQQ | PRO,
}
DEFAULT = {
    "plan.micro_batch": 1,
    "train.rows_per_step": 2,
    "data.context": 512,
    "data.too_long": "drop",
    "train.epochs": 1.0,
    "data.sets": ["alpaca_sample"],
    "data.sets_limit": 512,
    "plan.strategy": "fsdp",
    "plan.checkpointing": "layers",
    "plan.offload_base": True,
    "plan.offload_activations": False,
    "model.dtype": "bf16",
    "model.path": "meta-llama/Llama-2-7b-hf",
    "export.writers": [],
    "train.lr": 1e-5,
    "train.clip": 0.0,
    "train.weight_decay": 0.1,
    "train.optimizer": "adamw",
    "train.beta1": 0.9,
    "train.beta2": 0.95,
    "train.epsilon": 1e-5,
    "train.schedule": "constant",
    "train.warmup": 0.0,
    "train.log": ["tqdm"],
    "data.seed": 42,
    "adapt.seed": 42,
    "train.seed": 42,
    "root": "runs",
}
"""What no train type changes, on two GPUs; the run's name aside."""


def translation(line: str, gpus: int = 2, on_gpu: bool = True) -> Translation:
    return translate(parse(shlex.split(line)), gpus, on_gpu)


def settings(line: str, gpus: int = 2, on_gpu: bool = True) -> dict[str, Any]:
    return translation(line, gpus, on_gpu).settings


def printed(command: str, gpus: int = 2, on_gpu: bool = True) -> Translation:
    """Of a whole command as a shell reads it."""
    words = shlex.split(command.replace("\\\n", " "))  # shlex keeps the end of a line that a shell joins
    return translate(parse(words[next(at for at, word in enumerate(words) if word.endswith("train.py")) + 1 :]), gpus, on_gpu)


def expanded(train_type: str) -> str:
    return f"--train_type {train_type}" + (" --llama_pro_path x_blk_exp-32-35" if "llama_pro" in train_type else "")
