"""Reads what a machine is. Every probe survives whatever is not there: it then gives None, and never raises."""

import contextlib
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any, TypeVar

from burnish.plan.doctor.facts import Disk, Facts, Gpu, Gpus, Memory, Software, System

PACKAGES = ("torch", "transformers", "bitsandbytes", "safetensors", "gguf")
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "OMP_NUM_THREADS",
    "BURNISH_CACHE",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "NCCL_DEBUG",
    "NCCL_IB_DISABLE",
    "NCCL_P2P_DISABLE",
    "NCCL_SHM_DISABLE",
    "NCCL_SOCKET_IFNAME",
)
PROBE_BYTES = 64_000_000
"""Of the file that a disk's speed is measured with. It is removed again."""
SECONDS = 10.0
"""For another program to answer: nvidia-smi hangs where a GPU has fallen off the bus."""
NVIDIA = "0x10de"
GPU_COLUMNS = (
    "name",
    "memory.total",
    "memory.used",
    "compute_cap",
    "pcie.link.width.current",
    "pcie.link.width.max",
    "pcie.link.gen.current",
    "pcie.link.gen.max",
    "driver_version",
)
T = TypeVar("T")


def probe(places: dict[str, Path]) -> Facts:
    """Everything of this machine. `places` are folders that a run writes to, by what they are for: each gets a file for a moment.

    Costs the import of torch, a start of nvidia-smi, and some seconds for each folder on a slow disk.
    """
    installed = software()
    return Facts(
        system=system(),
        software=installed,
        gpus=gpus(),
        memory=memory(),
        cores=tried(lambda: len(os.sched_getaffinity(0))) or os.cpu_count() or 0,
        disks=tuple(disk(purpose, path) for purpose, path in places.items()),
    )


def tried(read: Callable[[], T]) -> T | None:
    """What `read` gives, or None: there is no end of ways in which a driver, a mount or a package can be half there."""
    try:
        return read()
    except Exception:
        return None


def text_of(path: str) -> str:
    """A file's text; empty where it cannot be read."""
    return tried(lambda: Path(path).read_text(encoding="utf-8", errors="replace")) or ""


def said_by(*command: str) -> str:
    """What a program prints; empty where it is not there, fails or hangs."""

    def ask() -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
        return done.stdout

    return tried(ask) or ""


# --- the parts


def system() -> System:
    """Operating system, container, and what the environment says."""
    limit = tried(lambda: resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    return System(
        name=tried(platform.platform) or sys.platform,
        wsl="microsoft" in text_of("/proc/version").lower(),
        container=Path("/.dockerenv").exists() or Path("/run/.containerenv").exists() or "container" in os.environ,
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
        hf_token=bool(tried(_has_token)),
        open_files=limit,
    )


def _has_token() -> bool:
    from huggingface_hub import get_token

    return bool(get_token())


def software() -> Software:
    """Versions of what a run needs, whether they meet burnish's requirements and can be imported, and what torch says of itself."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    broken: dict[str, str] = {}
    for name in ("burnish", *PACKAGES):
        versions[name] = _version(name)
        if name in PACKAGES and versions[name] is not None and (why := _why_not(name)):
            broken[name] = why
    torch = sys.modules.get("torch") if "torch" not in broken else None
    return Software(
        versions=versions,
        unmet=tried(_unmet) or (),
        broken=broken,
        torch_cuda=tried(lambda: _torch(torch).version.cuda),
        torch_gpus=(tried(lambda: _torch(torch).cuda.device_count() if _torch(torch).cuda.is_available() else 0)) or 0,
        torch_kernels=tuple(tried(lambda: _torch(torch).cuda.get_arch_list()) or ()),
    )


def _torch(module: Any) -> Any:
    assert module is not None
    return module


def _version(name: str) -> str | None:
    return tried(lambda: version(name))


def _why_not(name: str) -> str | None:
    """The last line of why a package cannot be imported: a library of CUDA's that is missing shows here."""
    try:
        import_module(name)
    except Exception as problem:
        return f"{type(problem).__name__}: {str(problem).strip().splitlines()[-1] if str(problem).strip() else 'no reason given'}"
    return None


def _unmet() -> tuple[str, ...]:
    """burnish's own requirements that what is installed does not meet."""
    from packaging.requirements import Requirement

    found = []
    for line in requires("burnish") or ():
        need = Requirement(line)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        have = _version(need.name)
        if have is None or not need.specifier.contains(have, prereleases=True):
            found.append(f"{need.name}{need.specifier}")
    return tuple(found)


def gpus() -> Gpus:
    """GPUs by nvidia-smi, or else by torch, or else what the PCI bus says."""
    query = (f"--query-gpu={','.join(GPU_COLUMNS)}", "--format=csv,noheader,nounits")
    listed = tried(lambda: _by_nvidia_smi(said_by("nvidia-smi", *query) or said_by("/usr/lib/wsl/lib/nvidia-smi", *query)))
    devices, driver = listed or ((), None)
    return Gpus(
        devices=devices or tuple(tried(_by_torch) or ()),
        on_bus=tried(_on_bus) or 0,
        driver=driver or tried(_driver_of_kernel),
        p2p=tried(_p2p),
    )


def _by_nvidia_smi(text: str) -> tuple[tuple[Gpu, ...], str | None]:
    """(GPUs, the driver's version) from a line for each, with GPU_COLUMNS. What a GPU does not tell stands there as `[N/A]`."""
    found: list[Gpu] = []
    driver = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(GPU_COLUMNS):
            continue
        row = dict(zip(GPU_COLUMNS, cells, strict=True))
        total, used = _number(row["memory.total"]), _number(row["memory.used"])
        major, point, minor = row["compute_cap"].partition(".")
        driver = row["driver_version"]
        found.append(
            Gpu(
                name=row["name"],
                memory_bytes=(total or 0) << 20,
                used_bytes=None if used is None else used << 20,
                capability=(int(major), int(minor)) if point and major.isdigit() and minor.isdigit() else None,
                pcie_width=_number(row["pcie.link.width.current"]),
                pcie_width_max=_number(row["pcie.link.width.max"]),
                pcie_generation=_number(row["pcie.link.gen.current"]),
                pcie_generation_max=_number(row["pcie.link.gen.max"]),
            )
        )
    return tuple(found), driver


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _by_torch() -> list[Gpu]:
    import torch

    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [Gpu(name=gpu.name, memory_bytes=gpu.total_memory, capability=(gpu.major, gpu.minor)) for gpu in found]


def _on_bus() -> int:
    """NVIDIA's devices of PCI class 3 (display), by their folders in /sys: they are there without a driver too."""
    devices = Path("/sys/bus/pci/devices").iterdir()
    return sum(text_of(f"{each}/vendor").strip() == NVIDIA and text_of(f"{each}/class").startswith("0x03") for each in devices)


def _driver_of_kernel() -> str | None:
    found = re.search(r"Kernel Module\D*?(\d+\.\d+(?:\.\d+)?)", text_of("/proc/driver/nvidia/version"))
    return found.group(1) if found else None


def _p2p() -> bool | None:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    pairs = [(one, other) for one in range(count) for other in range(count) if one != other]
    return all(torch.cuda.can_device_access_peer(one, other) for one, other in pairs) if pairs else None


def memory() -> Memory:
    """Host memory, what a container leaves of it, swap, and /dev/shm."""

    def limit() -> int:
        from burnish.plan.machine import host_bytes

        return host_bytes()

    def read() -> tuple[int, int]:
        import psutil

        return psutil.virtual_memory().total, psutil.swap_memory().total

    total, swap = tried(read) or (0, 0)
    return Memory(
        total_bytes=total,
        limit_bytes=tried(limit) or total,
        swap_bytes=swap,
        shared_bytes=tried(lambda: shutil.disk_usage("/dev/shm").total),
    )


def disk(purpose: str, path: Path) -> Disk:
    """Free space and speed where the folder is or will be. Writes PROBE_BYTES there, or a tenth of what is free, and removes them."""
    place = path.expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    free = tried(lambda: shutil.disk_usage(place).free) or 0
    size = min(PROBE_BYTES, free // 10)
    try:
        write, read = _speed(place, size)
    except OSError as problem:
        return Disk(purpose=purpose, path=str(path), free_bytes=free, problem=problem.strerror or str(problem))
    return Disk(purpose=purpose, path=str(path), free_bytes=free, write_bytes_per_s=write, read_bytes_per_s=read)


def _speed(folder: Path, size: int) -> tuple[float | None, float | None]:
    """(written, read) bytes in a second."""
    block = os.urandom(1 << 20)  # what cannot be compressed
    handle, name = tempfile.mkstemp(prefix=".burnish-doctor-", dir=folder)
    try:
        started = time.perf_counter()
        left = size
        while left > 0:
            left -= os.write(handle, block[:left])
        os.fsync(handle)
        written = time.perf_counter() - started
        with contextlib.suppress(OSError, AttributeError):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.lseek(handle, 0, os.SEEK_SET)
        started = time.perf_counter()
        while os.read(handle, 1 << 20):
            pass
        read = time.perf_counter() - started
    finally:
        os.close(handle)
        os.unlink(name)
    return (size / written, size / read) if size and written > 0 and read > 0 else (None, None)
