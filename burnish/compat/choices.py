"""What a choice of the original's stands for: one table for each argument that has choices."""

from dataclasses import dataclass
from typing import Any

Settings = dict[str, Any]
"""By their dotted names: `train.lr`."""


@dataclass(frozen=True)
class TrainType:
    """What a train type stands for."""

    method: str
    format: str


TRAIN_TYPES = {
    "full": TrainType("full", "none"),
    "lora": TrainType("lora", "none"),
    "custom_lora": TrainType("lora", "none"),
    "qlora": TrainType("lora", "nf4"),
    "custom_qlora": TrainType("lora", "nf4"),
    "hqq_lora": TrainType("lora", "hqq"),
    "bnb_dora": TrainType("dora", "nf4"),
    "hqq_dora": TrainType("dora", "hqq"),
    "bnb_llama_pro": TrainType("expand", "nf4"),
    "hqq_llama_pro": TrainType("expand", "hqq"),
}
TARGETS = {"all": ["k_proj", "q_proj", "v_proj", "up_proj", "down_proj", "gate_proj"], "default": ["q_proj", "v_proj"]}
"""`default` is what PEFT takes for Llama and Mistral."""
DATASETS = ("alpaca", "alpaca_sample", "dummy", "guanaco", "sql", "orca_math")
"""Named alike in burnish."""
LIMITED = ("alpaca_sample", "dummy", "orca_math")
"""The data sets that `--dataset_samples` cuts."""
STRATEGIES = {
    "full_shard": "fsdp",
    "shard_grad_op": "fsdp-grad",
    "ddp": "ddp",
    "hybrid_full_shard": "hybrid",
    "hybrid_shard_grad_op": "hybrid-grad",
}
PRECISIONS: dict[str, Settings] = {
    "fp32": {"model.dtype": "fp32"},
    "bf16": {"model.dtype": "bf16"},
    "fp16_autocast": {"model.dtype": "fp32", "model.autocast": "fp16"},
    "bf16_autocast": {"model.dtype": "fp32", "model.autocast": "bf16"},
    "bf16_buffers_autocast": {"model.dtype": "bf16"},
}
"""What is trained is fp32 in each of them, and so are buffers (rotary frequencies): the last one is bf16."""
STORED = {"fp32": "fp32", "bf16": "bf16", "fp16_autocast": "fp32", "bf16_autocast": "fp32", "bf16_buffers_autocast": "bf16"}
"""How weights that were trained themselves were held, and saved."""
OPTIMIZERS: dict[str, Settings] = {
    "adamw": {"train.optimizer": "adamw", "train.beta1": 0.9, "train.beta2": 0.95, "train.epsilon": 1e-5},
    "adam": {"train.optimizer": "adam", "train.beta1": 0.9, "train.beta2": 0.999, "train.epsilon": 1e-8},
    "sgd": {"train.optimizer": "sgd", "train.momentum": 0.0},
    "adadelta": {"train.optimizer": "adadelta", "train.rho": 0.9, "train.epsilon": 1e-6},
}
OPTIMIZERS |= {"fused_adamw": OPTIMIZERS["adamw"], "fused_adam": OPTIMIZERS["adam"]}
"""The fused two were choices of some versions. With the values that torch takes where the original gave none."""
WARMUP = {"constant": 0.0, "linear": 0.1, "cosine": 0.1}
FLOOR = {"cosine": {"train.lr_floor": 0.1}}
LOGS = {"tqdm": ["tqdm"], "wandb": ["wandb"], "stdout": ["stdout"]}
