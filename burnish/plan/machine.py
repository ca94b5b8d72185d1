"""What there is to run on."""

import os
import platform
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil
import torch

from burnish.config import PlanConfig
from burnish.errors import UserError
from burnish.plan.gpus import Gpu, like, parse_gpus

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
    gpu: Gpu | None = None
    """How fast its GPUs are, where that is known."""
    here: bool = True
    """Whether it is this machine: its disks can be looked at."""
    host_of_here: bool = False
    """Whether another machine was asked for, and its host memory is taken to be this one's."""


def this_machine() -> Machine:
    """This machine: its GPUs where torch sees any, else its CPU.

    Total memory, not what is free now, so that a plan does not change by the minute.
    """
    host, cores = host_bytes(), len(os.sched_getaffinity(0))
    if not torch.cuda.is_available():
        return Machine("cpu", 1, host, host, cores, False, platform.processor() or platform.machine())
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    bf16 = all((gpu.major, gpu.minor) >= (8, 0) for gpu in gpus)  # older ones only emulate it
    smallest = min(gpus, key=lambda gpu: gpu.total_memory)
    known = like(smallest.name, smallest.total_memory)
    return Machine("cuda", len(gpus), smallest.total_memory, host, cores, bf16, gpus[0].name, known)


def imagined_machine(gpus: str | None, ram: str | None) -> Machine:
    """This machine, with the GPUs (`2x4090`, `2x24GB`, `none`) and the host memory (`64GB`) that are asked for in the place of its own.

    Raises a `UserError` for what names no machine.
    """
    machine = this_machine()
    if ram is not None:
        machine = replace(machine, host_bytes=parse_ram(ram))
    if gpus is None:
        return machine if machine.device == "cuda" else replace(machine, device_bytes=machine.host_bytes)
    if gpus.strip().lower() == "none":
        return replace(
            machine, device="cpu", devices=1, device_bytes=machine.host_bytes, bf16=False, name="a CPU", gpu=None, host_of_here=ram is None
        )
    count, gpu, memory = parse_gpus(gpus)
    name = f"{count} × {gpu.name}" if memory == gpu.bytes else f"{count} × {memory / 1e9:.3g} GB, as fast as an {gpu.name}"
    return Machine("cuda", count, memory, machine.host_bytes, machine.cores, gpu.bf16, name, gpu, here=False, host_of_here=ram is None)


def parse_ram(text: str) -> int:
    """Bytes of `64GB` (10^9), `64GiB` (2^30) or `64`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gb|gib|g)?", text.strip().lower())
    if found is None or not float(found[1]):
        raise UserError(f"--ram {text!r}: write the host's memory as 64GB.")
    return round(float(found[1]) * (2**30 if found[2] == "gib" else 10**9))


def with_pins(machine: Machine, pins: PlanConfig) -> Machine:
    """The machine with the memory that `plan.device_gb` and `plan.host_gb` say it has."""
    host = machine.host_bytes if pins.host_gb is None else round(pins.host_gb * 1e9)
    device = machine.device_bytes if machine.device == "cuda" else host
    if pins.device_gb is not None:
        device = round(pins.device_gb * 1e9)
    return replace(machine, device_bytes=device, host_bytes=host, host_of_here=machine.host_of_here and pins.host_gb is None)


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
