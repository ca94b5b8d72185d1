"""How long a step and a start take: the cost model, with every constant and where it is from. Estimates: one GPU was measured, an H100.

A step takes as long as the slower of its arithmetic and its transfers, which run beside each other, and then its optimizer.

    arithmetic   tokens × (4 × frozen weights + 6 × trained ones, 2 × either more where a layer is recomputed
                 + 6 × the head's + attention) / (peak × UTILIZATION), and passes over device memory: the weights decoded once per pass, and
                 on a GPU what lies between the products. For each micro-batch on a GPU at least what the host takes to start its kernels
    transfers    per micro-batch: what a rank gathers of the layers, forward and backward, and the gradients that it spreads; layers of a
                 base that waits in host memory, twice; activations that wait there, out and in
    start        download, reading, quantizing, writing the cache; from then on reading the cache
"""

import math
from dataclasses import dataclass

from transformers import PretrainedConfig

from burnish.adapt.methods import METHODS
from burnish.config import Plan, RunConfig
from burnish.model.network import DTYPES
from burnish.plan.bytes import MOMENTS, SCALES, WEIGHTS, Persistent
from burnish.plan.gpus import GPUS, UNNAMED, Gpu
from burnish.plan.machine import Machine
from burnish.train.optimizer import OPTIMIZERS

UTILIZATION = 0.75
"""Share of a GPU's data-sheet peak that products reach: 0.76 on an H100 (bf16, the shapes of Llama-3-8B, 2,048 rows). With all else, a step
of Llama-3-8B reaches 0.36 there; the tokens/s that fsdp_qlora published (benchmarks_03_2024.md: Llama-2 7B and 70B, Yi 34B on
3090, 4090, A5000, A100, H100) come to 0.33 to 0.68."""
BETWEEN = 22
"""Passes over the outputs of a layer's products (norms, rotation, activation, sums, adapters), forward and backward: 0.17 s of a step of
8,192 tokens of Llama-3-8B on an H100, at 3.0 TB/s."""
SLOWER = {"bf16": 1.0, "fp16": 1.0, "fp32": 1 / 4, "fp64": 1 / 64}
"""Peak of another dtype on a GPU: rough, since kinds of GPU differ."""
CORE_FLOPS = 65e9
"""What one core of a CPU reaches: the demo's 301 tokens/s on two (docs/performance.md); half of it in fp64."""
CORE_BANDWIDTH = 10e9
"""Bytes a second that a core decodes to: 0.09 s of a step of SmolLM2 on two cores (docs/performance.md)."""
PCIE = {3: 12e9, 4: 24e9, 5: 48e9}
"""Bytes a second over 16 lanes, in one direction: three quarters of what the PCI Express specifications give (16, 32, 64 GB/s)."""
STAGED = 0.5
"""Share of that between GPUs without NVLink: most consumer cards may not write to each other, so that all goes through host memory."""
NVLINK = 0.8
GLOO = 2e9
"""Bytes a second between processes on a CPU: a guess."""
HEAD = 6
"""FLOPs of the head for each weight and token: logits, logits again where the loss is computed in pieces, gradient."""
ATTENTION, ATTENTION_AGAIN = 7, 2
"""FLOPs of causal attention for each position seen, token and width: 2 forward, 5 backward (FlashAttention-2, arXiv 2307.08691)."""

LAUNCH, LAUNCH_WITH_ADAPTERS = 1e-3, 5.5e-3
"""Seconds that the host takes to start the kernels of one pass through one decoder layer on a GPU, however few tokens there are: 0.53 to
0.63 s a step of 32 layers with DoRA beside an H100, whose kernels took 0.21 s. Without adapters: a guess from their number."""

DOWNLOAD = 50e6
"""Bytes a second from the hub: a line of 400 Mbit/s."""
DISK = 1e9
"""Bytes a second of an SSD."""
PROCESS_SECONDS = 8
"""Importing torch and transformers in a fresh process."""
QUANTIZE_NS = {
    "none": 0,
    "stored": 0,
    "nf4": 27,
    "fp4": 27,
    "int8": 27,
    "int8_row": 27,
    "q4_0": 27,
    "q4_1": 27,
    "q8_0": 27,
    "int4": 170,
    "hqq": 170,
}
"""Nanoseconds of one core for a weight: nf4, int4 and hqq were measured, the others are taken to be like the nearer of them."""
QUANTIZE_PASSES = 7
"""On a GPU, passes over its memory for each of these nanoseconds that a core needs: a guess, some 200 for nf4."""


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step on the slowest rank. `tokens` is what all ranks together read in it."""

    arithmetic: float
    transfers: float
    optimizer: float
    tokens: int

    @property
    def seconds(self) -> float:
        return max(self.arithmetic, self.transfers) + self.optimizer

    @property
    def bound(self) -> str:
        return "arithmetic" if self.arithmetic >= self.transfers else "transfers"


@dataclass(frozen=True)
class Start:
    """Seconds before the first step: the download (0 where the files are here), the first start after it, and every later one."""

    download: float
    first: float
    again: float


def step_cost(config: RunConfig, plan: Plan, machine: Machine, kept: Persistent, net: PretrainedConfig) -> Step:
    """What a step under the plan would take. `kept` is counted for the plan. Costs nothing."""
    context = config.data.context
    share = math.ceil(config.train.rows_per_step / plan.ranks)
    micro_batches = math.ceil(share / plan.micro_batch)
    again = 1 / plan.checkpoint_every if plan.checkpointing else 0.0
    frozen, trained = _numbers(config, plan, kept, net)
    width = _head_width(net) * net.num_attention_heads
    seen = sum(min(context, window) for window in _windows(net, context))
    per_token = frozen * (4 + 2 * again) + trained * (6 + 2 * again) + HEAD * net.vocab_size * net.hidden_size
    per_token += (ATTENTION + ATTENTION_AGAIN * again) * seen * width
    arithmetic = share * context * per_token / _flops(plan, machine)
    if config.model.format != "none":
        decoded = frozen * (_bits(kept, frozen) / 8 + 2 * DTYPES[plan.dtype].itemsize)  # written, and read by the product
        arithmetic += micro_batches * (2 + again) * decoded / _bandwidth(plan, machine)
    if plan.device == "cuda":
        outputs = _outputs(net, width) * net.num_hidden_layers * DTYPES[plan.dtype].itemsize
        arithmetic += share * context * BETWEEN * (1 + again / 3) * outputs / _bandwidth(plan, machine)
        launch = LAUNCH_WITH_ADAPTERS if METHODS[config.adapt.method].adapts else LAUNCH
        arithmetic = max(arithmetic, micro_batches * (3 + again) * net.num_hidden_layers * launch)
    moments = 0 if OPTIMIZERS[config.train.optimizer].paged else kept.parts[MOMENTS]
    update = 3 * (kept.trained // plan.shards + moments) / _bandwidth(plan, machine)
    return Step(arithmetic, _transfers(config, plan, machine, kept, net, micro_batches), update, config.train.rows_per_step * context)


def start_cost(config: RunConfig, plan: Plan, machine: Machine, kept: Persistent, local: bool) -> Start:
    """What starting takes; `local` says that the base's files are on this disk."""
    quantize = kept.weights * QUANTIZE_NS[config.model.format]
    if plan.device == "cpu":
        encoding = quantize * 1e-9 / machine.cores
    else:  # each rank its own rows, or all of them where every rank has a copy
        encoding = quantize * QUANTIZE_PASSES / _bandwidth(plan, machine) / plan.shards
    first = PROCESS_SECONDS + kept.published / DISK + encoding
    cached = config.model.cache and QUANTIZE_NS[config.model.format] > 0
    again = PROCESS_SECONDS + kept.cached / DISK if cached else first
    return Start(0.0 if local else kept.published / DOWNLOAD, first + (kept.cached / DISK if cached else 0.0), again)


def token_cost(machine: Machine, kept: Persistent) -> float:
    """Seconds that one more token of every answer of a batch takes at least, where the base waits in host memory: all layers come once."""
    return sum(kept.base_layers) / _pcie(machine)


def _transfers(config: RunConfig, plan: Plan, machine: Machine, kept: Persistent, net: PretrainedConfig, micro_batches: int) -> float:
    others = _between(plan, machine)
    seconds = 0.0
    if plan.sharded:
        away = (plan.shards - 1) / plan.shards
        gathered = (1 if plan.stays_gathered else 2) * (kept.cached + kept.trained) + kept.trained
        seconds += micro_batches * away * gathered / others
    copies = plan.ranks // plan.shards
    if copies > 1:  # gradients, once a step
        seconds += 2 * (copies - 1) / copies * kept.trained / plan.shards / others
    if plan.device == "cuda":
        moved = 2 * sum(kept.base_layers) / plan.shards if plan.offload_base else 0.0
        if plan.checkpointing and plan.offload_activations:
            inputs = math.ceil(net.num_hidden_layers / plan.checkpoint_every) * plan.micro_batch * config.data.context
            moved += 2 * inputs * net.hidden_size * DTYPES[plan.dtype].itemsize
        seconds += micro_batches * moved / _pcie(machine)
    return seconds


def _numbers(config: RunConfig, plan: Plan, kept: Persistent, net: PretrainedConfig) -> tuple[int, int]:
    """(frozen, trained) numbers that a token is multiplied with in the decoder layers."""
    ends = net.vocab_size * net.hidden_size * (1 if net.tie_word_embeddings else 2)
    layers = kept.weights - ends
    trained = kept.trained // (8 if plan.dtype == "fp64" else 4)
    if METHODS[config.adapt.method].adapts:
        return layers, trained
    return max(0, layers - trained), min(trained, layers)


def _bits(kept: Persistent, frozen: int) -> float:
    return 8 * (kept.moved[WEIGHTS] + kept.moved[SCALES]) / frozen if frozen else 0.0


def _windows(net: PretrainedConfig, context: int) -> list[int]:
    """Positions that a token of each layer sees, on average over a context."""
    window = getattr(net, "sliding_window", None) or context
    kinds = getattr(net, "layer_types", None) or ["full_attention"] * net.num_hidden_layers
    return [window if kind == "sliding_attention" else context for kind in kinds]


def _outputs(net: PretrainedConfig, width: int) -> int:
    """Numbers that the products of a decoder layer give for a token: query, keys and values, output; gate, up and down."""
    groups = getattr(net, "num_key_value_heads", None) or net.num_attention_heads
    inner = getattr(net, "intermediate_size", None) or 4 * net.hidden_size
    return width + 2 * groups * _head_width(net) + 2 * net.hidden_size + 2 * inner


def _head_width(net: PretrainedConfig) -> int:
    return getattr(net, "head_dim", None) or net.hidden_size // net.num_attention_heads


def _gpu(machine: Machine) -> Gpu:
    return machine.gpu or GPUS[UNNAMED]


def _flops(plan: Plan, machine: Machine) -> float:
    if plan.device == "cpu":
        return CORE_FLOPS * machine.cores / plan.ranks * (0.5 if plan.dtype == "fp64" else 1)
    return _gpu(machine).teraflops * 1e12 * UTILIZATION * SLOWER[plan.dtype]


def _bandwidth(plan: Plan, machine: Machine) -> float:
    if plan.device == "cpu":
        return CORE_BANDWIDTH * machine.cores / plan.ranks
    return _gpu(machine).gigabytes_per_second * 1e9


def _pcie(machine: Machine) -> float:
    gpu = _gpu(machine)
    return PCIE[gpu.pcie] * gpu.lanes / 16


def _between(plan: Plan, machine: Machine) -> float:
    """Bytes a second that a rank gets from others."""
    if plan.device == "cpu":
        return GLOO
    nvlink = _gpu(machine).nvlink
    return nvlink * 1e9 * NVLINK if nvlink else STAGED * _pcie(machine)


def in_words(seconds: float) -> str:
    """A duration as a person says it, to two digits."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{_two(seconds / size)} {unit}"
    return f"{_two(seconds)} s"


def _two(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.2g}"
