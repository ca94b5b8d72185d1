"""The original's arguments → burnish settings. `FATES` is the one table: what becomes of each argument.

Settings are written by their dotted names (`train.lr`), so that a line that is wrong is found by searching for the name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from burnish.compat.choices import (
    DATASETS,
    FLOOR,
    LIMITED,
    LOGS,
    OPTIMIZERS,
    PRECISIONS,
    STORED,
    STRATEGIES,
    TARGETS,
    TRAIN_TYPES,
    WARMUP,
    Settings,
    TrainType,
)
from burnish.compat.llama_pro import new_blocks_of
from burnish.errors import UserError, did_you_mean
from burnish.runs import digest


@dataclass(frozen=True)
class Asked:
    """The arguments' values by name, and what they are to run on: `gpus` processes, 1 on a CPU."""

    v: SimpleNamespace
    gpus: int
    on_gpu: bool

    @property
    def kind(self) -> TrainType:
        return TRAIN_TYPES[self.v.train_type]


@dataclass(frozen=True)
class Becomes:
    """Translated, into some or all of `names`: settings by their dotted names."""

    names: tuple[str, ...]
    settings: Callable[[Asked], Settings]


@dataclass(frozen=True)
class With:
    """Translated together with another argument."""

    argument: str


@dataclass(frozen=True)
class NoEffect:
    """Accepted, and nothing follows."""

    why: str


@dataclass(frozen=True)
class Refused:
    """Only its default is accepted, or what `unless` allows."""

    why: str
    unless: tuple[Any, ...] = ()


Fate = Becomes | With | NoEffect | Refused


def _same(setting: str, argument: str) -> Becomes:
    return Becomes((setting,), lambda asked: {setting: getattr(asked.v, argument)})


def _gpus(asked: Asked) -> Settings:
    return {} if asked.v.world_size == -1 else {"plan.ranks": asked.v.world_size}


def _train_type(asked: Asked) -> Settings:
    block = {} if asked.kind.format == "none" else {"model.block": 64}
    scales = {"nf4": {"model.double_quantized": True}, "hqq": {"model.bits": asked.v.n_bits}}.get(asked.kind.format, {})
    start = {"adapt.start": "normal"} if asked.kind.method == "dora" else {}
    return {"model.format": asked.kind.format} | block | scales | {"adapt.method": asked.kind.method} | start


def _new_blocks(asked: Asked) -> Settings:
    return {"adapt.new_blocks": new_blocks_of(asked.v.llama_pro_path)} if asked.kind.method == "expand" else {}


def _adapter(setting: str, value: Callable[[SimpleNamespace], Any]) -> Becomes:
    """A setting of a low-rank adapter, for the train types that have one."""
    return Becomes((setting,), lambda asked: {setting: value(asked.v)} if asked.kind.method in ("lora", "dora") else {})


def _alpha(asked: Asked) -> Settings:
    return {"lora": {"adapt.alpha": float(asked.v.lora_alpha)}, "dora": {"adapt.alpha": float(asked.v.lora_rank)}}.get(
        asked.kind.method, {}
    )


def _dropout(asked: Asked) -> Settings:
    return {"lora": {"adapt.dropout": asked.v.lora_dropout}, "dora": {"adapt.dropout": 0.0}}.get(asked.kind.method, {})


def _dataset(asked: Asked) -> Settings:
    """A set of the original's, `NAME=PATH` for a local copy of one, or a file of rows."""
    name, equals, copy = asked.v.dataset.partition("=")
    if name in DATASETS:
        return {"data.sets": [f"{name}={Path(copy).expanduser().resolve()}" if equals else name]}
    if Path(asked.v.dataset).expanduser().exists():
        return {"data.rows": [str(Path(asked.v.dataset).expanduser().resolve())]}
    known = did_you_mean(name, list(DATASETS))
    raise UserError(f"--dataset {asked.v.dataset}: no data set of the original's, and no file of rows.{known}")


def _dataset_samples(asked: Asked) -> Settings:
    return {"data.sets_limit": asked.v.dataset_samples} if asked.v.dataset.partition("=")[0] in LIMITED else {}


def _batch(asked: Asked) -> Settings:
    """As many packed contexts in a step as the original had rows, each of at most a context."""
    return {
        "plan.micro_batch": asked.v.batch_size,
        "train.rows_per_step": asked.v.batch_size * asked.v.gradient_accumulation_steps * asked.gpus,
    }


def _strategy(asked: Asked) -> Settings:
    return {"plan.strategy": STRATEGIES[asked.v.sharding_strategy] if asked.gpus > 1 else "single"}


def _checkpointing(asked: Asked) -> Settings:
    return {"plan.checkpointing": "layers" if asked.v.use_gradient_checkpointing else "none"}


def _offload(asked: Asked) -> Settings:
    """Only where something is frozen, and a layer leaves the GPU after its use; on a CPU there is nothing to take it from."""
    return {"plan.offload_base": asked.v.use_cpu_offload and asked.on_gpu and asked.kind.method != "full" and base_can_leave(asked)}


def base_can_leave(asked: Asked) -> bool:
    """Whether the strategy leaves a GPU no more than the layers that are running, so that the rest can wait in host memory."""
    return asked.gpus == 1 or STRATEGIES[asked.v.sharding_strategy] in ("fsdp", "hybrid")


def _offload_activations(asked: Asked) -> Settings:
    """What checkpointing keeps: without it nothing of theirs is kept for long."""
    v = asked.v
    return {"plan.offload_activations": v.use_activation_cpu_offload and v.use_gradient_checkpointing and asked.on_gpu}


def _model(asked: Asked) -> Settings:
    """A folder by its whole path, so that the TOML means the same wherever it is kept."""
    path = Path(asked.v.model_name).expanduser()
    return {"model.path": str(path.resolve()) if path.exists() else asked.v.model_name}


def _folder(asked: Asked) -> Settings:
    """`--output_dir` where the model is to be saved. Else a folder of its own for each command line: the original wrote nothing then,
    and two runs in one folder would be refused."""
    if asked.v.save_model:
        path = Path(asked.v.output_dir).expanduser()
        path = path if path.name not in ("", "..") else path.resolve()
        return {"name": path.name, "root": str(path.parent)}
    model = Path(asked.v.model_name).name
    return {"name": f"{asked.v.train_type}-{model}-{digest(vars(asked.v))[:6]}", "root": "runs"}


def _writers(asked: Asked) -> Settings:
    if not asked.v.save_model:
        return {"export.writers": []}
    if asked.kind.method in ("lora", "dora"):
        return {"export.writers": ["peft"]}
    return {"export.writers": ["transformers"], "export.dtype": STORED[asked.v.precision]}


def _seeds(asked: Asked) -> Settings:
    return {f"{section}.seed": asked.v.seed for section in ("data", "adapt", "train")}


def _decay(asked: Asked) -> Settings:
    return {"train.weight_decay": asked.v.wd if asked.v.optimizer.endswith("adamw") else 0.0}


def _clip(asked: Asked) -> Settings:
    return {"train.clip": asked.v.grad_norm if asked.v.apply_gradient_clipping else 0.0}


def _schedule(asked: Asked) -> Settings:
    kind = asked.v.lr_scheduler
    return {"train.schedule": kind, "train.warmup": WARMUP[kind]} | FLOOR.get(kind, {})


def _steps(asked: Asked) -> Settings:
    """The original counts micro-batches, and ends two of them late; here it is that many micro-batches' worth of whole steps."""
    if asked.v.max_steps < 0:
        return {}
    return {"train.steps": max(1, -(-asked.v.max_steps // asked.v.gradient_accumulation_steps))}


def _profile(asked: Asked) -> Settings:
    """[wait, warm-up, record], once."""
    v = asked.v
    if not v.profile:
        return {}
    wait = v.wait_steps if v.repeat else v.profiling_frequency - v.warmup_steps - v.active_steps
    if wait < 0:
        raise UserError(
            f"--profiling_frequency {v.profiling_frequency}: less than --warmup_steps {v.warmup_steps} and "
            f"--active_steps {v.active_steps} take"
        )
    return {"train.profile": [wait, v.warmup_steps, v.active_steps]}


def _project(asked: Asked) -> Settings:
    return {"train.wandb_project": asked.v.project_name} if asked.v.log_to == "wandb" else {}


ONE_MACHINE = (
    "burnish starts the processes of one machine, and finds a free port; on several, start it with torchrun --rdzv-endpoint ADDR:PORT"
)
SHAPE_OF_PROFILE = "a trace has what torch writes without it"

FATES: dict[str, Fate] = {
    "world_size": Becomes(("plan.ranks",), _gpus),
    "train_type": Becomes(
        ("model.format", "model.block", "model.double_quantized", "model.bits", "adapt.method", "adapt.start"), _train_type
    ),
    "llama_pro_path": Becomes(("adapt.new_blocks",), _new_blocks),
    "batch_size": Becomes(("plan.micro_batch", "train.rows_per_step"), _batch),
    "context_length": Becomes(
        ("data.context", "data.too_long"), lambda asked: {"data.context": asked.v.context_length, "data.too_long": "drop"}
    ),
    "gradient_accumulation_steps": With("batch_size"),
    "num_epochs": Becomes(("train.epochs",), lambda asked: {"train.epochs": float(asked.v.num_epochs)}),
    "dataset": Becomes(("data.sets", "data.rows"), _dataset),
    "dataset_samples": Becomes(("data.sets_limit",), _dataset_samples),
    "sharding_strategy": Becomes(("plan.strategy",), _strategy),
    "use_gradient_checkpointing": Becomes(("plan.checkpointing",), _checkpointing),
    "reentrant_checkpointing": NoEffect("it went around memory that a bitsandbytes kernel kept; burnish's layer keeps none of it"),
    "use_cpu_offload": Becomes(("plan.offload_base",), _offload),
    "use_activation_cpu_offload": Becomes(("plan.offload_activations",), _offload_activations),
    "low_memory": NoEffect("each process always reads its own rows alone, and none ever holds the whole model"),
    "no_sync": NoEffect("gradients are always summed over the processes once a step, in its last micro-batch"),
    "precision": Becomes(("model.dtype", "model.autocast"), lambda asked: PRECISIONS[asked.v.precision]),
    "model_name": Becomes(("model.path",), _model),
    "save_model": Becomes(("export.writers", "export.dtype"), _writers),
    "output_dir": Becomes(("name", "root"), _folder),
    "lora_rank": _adapter("adapt.rank", lambda v: v.lora_rank),
    "lora_alpha": Becomes(("adapt.alpha",), _alpha),
    "lora_dropout": Becomes(("adapt.dropout",), _dropout),
    "lora_target_modules": _adapter("adapt.targets", lambda v: TARGETS[v.lora_target_modules]),
    "verbose": NoEffect("`burnish plan` shows what is done where, and why"),
    "lr": _same("train.lr", "lr"),
    "apply_gradient_clipping": Becomes(("train.clip",), _clip),
    "grad_norm": With("apply_gradient_clipping"),
    "wd": Becomes(("train.weight_decay",), _decay),
    "profile_memory": Becomes(("train.memory_snapshot",), lambda asked: {"train.memory_snapshot": True} if asked.v.profile_memory else {}),
    "optimizer": Becomes(
        ("train.optimizer", "train.beta1", "train.beta2", "train.epsilon", "train.momentum", "train.rho"),
        lambda asked: OPTIMIZERS[asked.v.optimizer],
    ),
    "lr_scheduler": Becomes(("train.schedule", "train.warmup", "train.lr_floor"), _schedule),
    "loading_workers": NoEffect("reading is bounded by bytes, not by workers"),
    "log_to": Becomes(("train.log",), lambda asked: {"train.log": LOGS[asked.v.log_to]}),
    "master_addr": Refused(ONE_MACHINE, unless=("127.0.0.1",)),
    "master_port": NoEffect(ONE_MACHINE),
    "seed": Becomes(("data.seed", "adapt.seed", "train.seed"), _seeds),
    "project_name": Becomes(("train.wandb_project",), _project),
    "name": NoEffect("a run is called after its folder: --output_dir"),
    "group": NoEffect("set WANDB_RUN_GROUP in the environment: wandb reads it"),
    "entity": NoEffect("set WANDB_ENTITY in the environment: wandb reads it"),
    "n_bits": With("train_type"),
    "profile": Becomes(("train.profile",), _profile),
    "profiling_output": NoEffect("it lies in the run's folder, 3-train/profile"),
    "with_stack": NoEffect(SHAPE_OF_PROFILE),
    "with_shapes": NoEffect(SHAPE_OF_PROFILE),
    "export_trace": NoEffect("the original never read it: a trace was always written"),
    "export_memory_timeline": NoEffect("--profile_memory keeps every allocation"),
    "wait_steps": With("profile"),
    "warmup_steps": With("profile"),
    "active_steps": With("profile"),
    "repeat": With("profile"),
    "profiling_frequency": With("profile"),
    "max_steps": Becomes(("train.steps",), _steps),
}
