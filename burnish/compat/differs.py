"""What a translated run does not do as the original did, said on the screen. One row for each difference, and when it is one."""

from collections.abc import Callable

from burnish.compat.arguments import ARGUMENTS, Given
from burnish.compat.mapping import FATES, Asked, NoEffect, base_can_leave


def _always(asked: Asked) -> bool:
    return True


def _method(*methods: str) -> Callable[[Asked], bool]:
    return lambda asked: asked.kind.method in methods


def _value(argument: str, *values: object) -> Callable[[Asked], bool]:
    return lambda asked: getattr(asked.v, argument) in values


def _offloaded(where: Callable[[Asked], bool]) -> Callable[[Asked], bool]:
    return lambda asked: asked.v.use_cpu_offload and asked.on_gpu and where(asked)


DIFFERENCES: tuple[tuple[Callable[[Asked], bool], str], ...] = (
    (
        lambda asked: asked.v.dataset != "dummy",
        "A step holds at most as many tokens: batch_size × gradient_accumulation_steps × GPUs contexts. The original put one row into each "
        "and padded it; here rows are packed until a context is full. So a step holds more rows, and an epoch has fewer steps: for "
        "about as many as the original had, divide train.rows_per_step by the rows that a context holds, or raise train.lr.",
    ),
    (
        _always,
        "The loss is the mean over all trained tokens of a step. The original averaged the means of its micro-batches and processes, "
        "in which a token of a short answer weighs more.",
    ),
    (
        _always,
        "What is trained is held in fp32. The original held it in bf16 (or fp16), in which most values near 1, DoRA's magnitudes first, "
        "do not move at its usual rates.",
    ),
    (
        _always,
        "A row that is longer than a context is left out, and counted (data.too_long=split cuts its answer into several rows). The "
        "original cut off what was too long, and where that left no answer its loss became NaN.",
    ),
    (
        _method("dora"),
        "The original's DoRA ignored --lora_alpha and --lora_dropout: here alpha = rank and dropout 0, which is what it did; A begins "
        "normal with deviation 1/√rank, as it did (adapt.start).",
    ),
    (
        _method("dora"),
        "Magnitudes begin at the norms of the quantized rows, so that the first step begins at the quantized model; the original took "
        "the norms of the rows before they were quantized. A bias is not scaled; the original scaled it.",
    ),
    (
        _method("expand"),
        "The expanded folder is not read: burnish expands --model_name itself, by the number of blocks that the folder's name tells. "
        "Only the new blocks train; the original also trained old ones whose number begins like a new one's (81 where 8 is new).",
    ),
    (
        _value("sharding_strategy", "full_shard", "shard_grad_op", "hybrid_full_shard", "hybrid_shard_grad_op"),
        "On one GPU nothing is sharded; on several, scales are sharded too, and adapters with them.",
    ),
    (
        _offloaded(lambda asked: asked.kind.method != "full" and base_can_leave(asked)),
        "Only the frozen base is kept in host memory. The original also moved what is trained and its optimizer there, and took each "
        "step on the CPU.",
    ),
    (
        _offloaded(lambda asked: asked.kind.method != "full" and not base_can_leave(asked)),
        "--use_cpu_offload does nothing with this --sharding_strategy, which keeps the whole base on each GPU for most of a step. With "
        "full_shard and hybrid_full_shard the base waits in host memory.",
    ),
    (
        _offloaded(_method("full")),
        "--use_cpu_offload: with full nothing is frozen, and what is trained stays on the GPUs.",
    ),
    (
        lambda asked: asked.v.use_activation_cpu_offload and not asked.v.use_gradient_checkpointing,
        "--use_activation_cpu_offload moves the inputs of recomputed layers, and without --use_gradient_checkpointing there are none.",
    ),
    (_value("precision", "fp32"), "Everything is computed in fp32. The original computed quantized layers and adapters in fp16."),
    (
        lambda asked: asked.v.precision == "fp16_autocast" and asked.v.apply_gradient_clipping,
        "Gradients are clipped after the loss scale is taken out of them. The original clipped them scaled, which all but stopped Adam.",
    ),
    (
        lambda asked: asked.v.max_steps >= 0,
        "train.steps counts optimizer steps, and takes the place of train.epochs. The original counted micro-batches, ended two later "
        "than asked, and fitted its schedule to all epochs.",
    ),
    (
        _value("profile", True),
        "One cycle of the profiler is recorded, and its steps are optimizer steps; the original repeated it, by micro-batches.",
    ),
    (
        lambda asked: asked.v.num_epochs > 1,
        "Each epoch draws the rows in an order of its own; the original repeated one order.",
    ),
    (
        lambda asked: asked.v.wd > 0 and asked.v.optimizer.endswith("adamw"),
        "Weight decay is for matrices; the original's also shrank magnitudes, norms and biases.",
    ),
    (
        lambda asked: asked.v.lora_target_modules == "default" and asked.v.train_type not in ("lora", "qlora", "full"),
        "--lora_target_modules default made the original fail with this train type; here it means what it means for lora and qlora.",
    ),
    (
        _value("save_model", True),
        "What is saved is a run's folder: 3-train with checkpoints, a resumable state and the adapter in PEFT's format; 5-export with what "
        "others read. The original wrote one model_state_dict.safetensors at the very end.",
    ),
    (
        _value("save_model", False),
        "The run is kept under runs/ all the same, with its checkpoints; nothing is exported from it.",
    ),
)


def differences(asked: Asked) -> list[str]:
    """Those that apply."""
    return [text for applies, text in DIFFERENCES if applies(asked)]


def without_effect(given: Given) -> list[str]:
    """Arguments that stood on the line, with another value than their default, and do nothing: each with the reason."""
    lines = []
    for name, fate in FATES.items():
        if isinstance(fate, NoEffect) and name in given.given and getattr(given.values, name) != ARGUMENTS[name].default:
            lines.append(f"--{name} has no effect: {fate.why}.")
    return lines
