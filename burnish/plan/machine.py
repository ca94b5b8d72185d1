"""What there is to run on."""

import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil
import torch

from burnish.config import PlanConfig

# cgroup v2, then v1: a container's limit is what kills a process, not the memory that the host has
_MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Machine:
    """One machine. All its devices are taken to be like its smallest."""

    device: Literal["cpu", "cuda"]
    devices: int
    device_bytes: int
    """Memory of one GPU; host memory on a CPU."""
    host_bytes: int
    cores: int
    bf16: bool
    """Whether a GPU multiplies bf16 faster than fp32. False on a CPU."""
    name: str


def this_machine() -> Machine:
    """This machine: its GPUs where torch sees any, else its CPU.

    Total memory, not what is free now, so that a plan does not change by the minute.
    """
    host, cores = host_bytes(), len(os.sched_getaffinity(0))
    if not torch.cuda.is_available():
        return Machine("cpu", 1, host, host, cores, False, platform.processor() or platform.machine())
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    bf16 = all((gpu.major, gpu.minor) >= (8, 0) for gpu in gpus)  # older ones only emulate it
    return Machine("cuda", len(gpus), min(gpu.total_memory for gpu in gpus), host, cores, bf16, gpus[0].name)


def with_pins(machine: Machine, pins: PlanConfig) -> Machine:
    """The machine with the memory that `plan.device_gb` and `plan.host_gb` say it has."""
    host = machine.host_bytes if pins.host_gb is None else round(pins.host_gb * 1e9)
    device = machine.device_bytes if machine.device == "cuda" else host
    if pins.device_gb is not None:
        device = round(pins.device_gb * 1e9)
    return replace(machine, device_bytes=device, host_bytes=host)


def host_bytes() -> int:
    """Host memory, or the container's share of it."""
    limits = [psutil.virtual_memory().total]
    for path in _MEMORY_LIMITS:
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():  # "max" is no limit
            limits.append(int(text))
    return min(limits)
