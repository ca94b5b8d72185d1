"""What is wrong with a machine, or only worth knowing: a table of rules. A new one is a function and its place in RULES."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from burnish.plan.doctor.facts import Facts, Gpu
from burnish.words import counted, gb

Severity = Literal["stops", "costs", "note"]
SEVERITIES: dict[Severity, str] = {"stops": "no run until it is mended", "costs": "time, memory or trouble", "note": "worth knowing"}

LEAST_DRIVER = {"11": 450, "12": 525, "13": 580}
"""The oldest driver on Linux for any CUDA of a major version (CUDA release notes, "CUDA Toolkit and Minimum Required Driver Versions")."""
BF16 = (8, 0)
"""Ampere: older GPUs only emulate bf16 (CUDA C++ programming guide, arithmetic instructions by compute capability)."""
LEAST_FREE = 5_000_000_000
"""A quantized model of 7 billion weights and some checkpoints of its adapters."""
SLOW_DISK = 100_000_000
"""Bytes in a second: a base of 14 GB then takes more than two minutes to read."""
LEAST_SHARED = 1_000_000_000
"""NCCL keeps some MB for each pair of GPUs in /dev/shm; containers are started with 64 MB."""
MANY_FILES = 10_000_000
"""Programs that close every possible file before they start another go through all of them (`ulimit -n` of some containers is 2^30)."""
FEW_FILES = 1024
LIBRARIES = {"cpu": 500_000_000, "cuda": 2_000_000_000}
"""Resident memory of a process without a model. Those of plan/phases.py, which cannot be imported where torch is broken."""
TAKEN = 0.1
"""Share of a GPU's memory that others may have without a word: a desktop takes less."""
WITHOUT_P2P = ("RTX 30", "RTX 40", "RTX 50")
"""GeForce cards without NVLink (the 3090 has a connector for a bridge): their driver leaves P2P over PCIe out."""


@dataclass(frozen=True)
class Finding:
    """`what` is so; `means` says what that is for a run, and `do` what to do, where anything is to be done."""

    severity: Severity
    what: str
    means: str
    do: str = ""


Found = Iterator[Finding]


def stops(findings: tuple[Finding, ...]) -> bool:
    """Whether something prevents a run."""
    return any(finding.severity == "stops" for finding in findings)


def findings_of(facts: Facts) -> tuple[Finding, ...]:
    """What every rule says, the worst first."""
    found = [finding for rule in RULES for finding in rule(facts)]
    return tuple(sorted(found, key=lambda finding: list(SEVERITIES).index(finding.severity)))


def has_gpu(facts: Facts) -> bool:
    """Whether there is an NVIDIA GPU, whatever torch says."""
    return bool(facts.gpus.devices or facts.gpus.on_bus or facts.gpus.driver)


def _requirements(facts: Facts) -> Found:
    software = facts.software
    for need in software.unmet:
        name = next((known for known in software.versions if need.startswith(known)), None)
        have = software.versions.get(name) if name else None
        is_there = f"{name} {have} is" if have else "something else, or nothing, is"
        yield Finding(
            "stops", f"{need} is needed, and {is_there} installed.", "burnish does not run.", f'Install it: pip install "{need}".'
        )
    for name, why in software.broken.items():
        yield Finding("stops", f"{name} cannot be imported: {why}.", "burnish does not run.", f"Install {name} anew in this environment.")


def _torch_without_cuda(facts: Facts) -> Found:
    if (
        has_gpu(facts)
        and facts.software.versions.get("torch")
        and facts.software.torch_cuda is None
        and "torch" not in facts.software.broken
    ):
        yield Finding(
            "stops",
            f"there is an NVIDIA GPU, and torch {facts.software.versions['torch']} is built for CPUs alone.",
            "A run takes the CPU, many times slower.",
            "Install torch's build for CUDA (https://pytorch.org/get-started/locally): "
            "pip install --force-reinstall torch --index-url of the CUDA version that the driver has.",
        )


def _torch_sees_no_gpu(facts: Facts) -> Found:
    software, given = facts.software, facts.system.environment.get("CUDA_VISIBLE_DEVICES")
    if not has_gpu(facts) or software.torch_cuda is None or software.torch_gpus:
        return
    old = _too_old(facts)
    if old is not None:
        yield old
    elif given is not None:
        why = f"CUDA_VISIBLE_DEVICES is {given!r}, and torch sees no GPU."
        yield Finding("stops", why, "A run takes the CPU.", "Unset it, or name GPUs that are there: CUDA_VISIBLE_DEVICES=0.")
    elif facts.gpus.driver is None:
        yield Finding(
            "stops",
            "there is an NVIDIA GPU, and no driver answers for it (nvidia-smi says nothing).",
            "A run takes the CPU.",
            "Install NVIDIA's driver"
            + (
                " on Windows, not inside WSL."
                if facts.system.wsl
                else ", or start the container with the GPUs: --gpus all."
                if facts.system.container
                else ", and restart the machine."
            ),
        )
    else:
        yield Finding(
            "stops",
            f"the driver ({facts.gpus.driver}) answers, and torch sees no GPU.",
            "A run takes the CPU.",
            'python -c "import torch; torch.cuda.init()" says why. After an update of the driver, restart the machine.',
        )


def _too_old(facts: Facts) -> Finding | None:
    build, driver = facts.software.torch_cuda, facts.gpus.driver
    least = LEAST_DRIVER.get((build or "").partition(".")[0])
    major = (driver or "").partition(".")[0]
    if least is None or not major.isdigit() or int(major) >= least:
        return None
    return Finding(
        "stops",
        f"the driver ({driver}) is older than {least}, which torch's CUDA {build} needs.",
        "torch cannot use the GPU.",
        f"Update NVIDIA's driver to {least} or newer, or install a build of torch for an older CUDA.",
    )


def _old_driver(facts: Facts) -> Found:
    if facts.software.torch_gpus and (old := _too_old(facts)) is not None:  # compatibility packages of data centres let it run
        yield Finding("costs", old.what, "It runs by CUDA's compatibility package; errors of it look like errors of the GPU.", old.do)


def _kernels(facts: Facts) -> Found:
    built = [kind.rpartition("_")[2] for kind in facts.software.torch_kernels]
    numbers = [int(digits) for kind in built if (digits := "".join(filter(str.isdigit, kind)))]
    for gpu in _kinds(facts):
        if gpu.capability and numbers and 10 * gpu.capability[0] + gpu.capability[1] < min(numbers):
            yield Finding(
                "stops",
                f"{gpu.name} has compute capability {gpu.capability[0]}.{gpu.capability[1]}, older than all that torch was built for "
                f"({min(numbers) // 10}.{min(numbers) % 10} and newer).",
                "No kernel runs on it.",
                "Install a build of torch for an older CUDA, which still has these kernels.",
            )


def _half_precision(facts: Facts) -> Found:
    for gpu in _kinds(facts):
        if gpu.capability and gpu.capability < BF16:
            yield Finding(
                "costs",
                f"{gpu.name} has no bf16.",
                "model.dtype=auto computes in fp16 with a scaled loss: a step that overflows is skipped and told.",
                "Nothing is to be done; model.dtype=fp32 is slower and never overflows.",
            )


def _different(facts: Facts) -> Found:
    devices = facts.gpus.devices
    if len({(gpu.name, gpu.memory_bytes >> 30) for gpu in devices}) > 1:
        least = min(devices, key=lambda gpu: gpu.memory_bytes)
        yield Finding(
            "costs",
            f"the GPUs differ: {', '.join(f'{gpu.name} ({gb(gpu.memory_bytes)})' for gpu in devices)}.",
            f"All are planned to be like the smallest ({gb(least.memory_bytes)}), and wait for the slowest.",
            "CUDA_VISIBLE_DEVICES=0,1 … leaves some out; alone, a large GPU may do more than in company.",
        )


def _taken(facts: Facts) -> Found:
    for number, gpu in enumerate(facts.gpus.devices):
        if gpu.used_bytes is not None and gpu.used_bytes > TAKEN * gpu.memory_bytes:
            yield Finding(
                "costs",
                f"{gb(gpu.used_bytes)} of the {gb(gpu.memory_bytes)} of GPU {number} are taken by other programs.",
                "The plan counts on all of it: a run that fits may run out of memory.",
                f"End them (nvidia-smi lists them), or plan for less: plan.device_gb={(gpu.memory_bytes - gpu.used_bytes) / 1e9:.1f}.",
            )


def _lanes(facts: Facts) -> Found:
    several = len(facts.gpus.devices) > 1
    for number, gpu in enumerate(facts.gpus.devices):
        width, most = gpu.pcie_width, gpu.pcie_width_max
        if width is not None and width <= 4:
            yield Finding(
                "costs",
                f"GPU {number} ({gpu.name}) has {width} PCIe lanes" + (f" of {most}." if most and most > width else "."),
                "What is gathered between GPUs, and what is brought from host memory, goes through them"
                + (": fsdp is slow, ddp much less so." if several else ": plan.offload_base and plan.offload_activations are slow."),
                "Put it into a slot with 16 lanes, without a riser cable; some mainboards take lanes away for an NVMe disk.",
            )
        elif gpu.pcie_generation == 1 and (gpu.pcie_generation_max or 0) > 1:
            yield Finding(
                "note",
                f"GPU {number} ({gpu.name}) is at PCIe generation 1 of {gpu.pcie_generation_max}.",
                "An idle GPU turns it down, and up again under load. If it stays at 1 then, transfers are slow.",
                "Look again while something runs: nvidia-smi -q -d PCIE.",
            )


def _peers(facts: Facts) -> Found:
    if len(facts.gpus.devices) < 2 or facts.gpus.p2p is not False:
        return
    consumer = any(mark in gpu.name for gpu in facts.gpus.devices for mark in WITHOUT_P2P)
    why = "as their driver has it for GeForce cards" if consumer else "WSL has none" if facts.system.wsl else "by mainboard or driver"
    yield Finding(
        "note",
        f"the GPUs do not read each other's memory (no P2P), {why}.",
        "NCCL goes through host memory: slower, and right. Where it does not notice by itself, the first step hangs.",
        "If it hangs: NCCL_P2P_DISABLE=1, and NCCL_DEBUG=INFO says what NCCL chose."
        + ("" if facts.system.environment.get("NCCL_P2P_DISABLE") != "1" else " NCCL_P2P_DISABLE=1 is set already."),
    )


def _shared_memory(facts: Facts) -> Found:
    shared = facts.memory.shared_bytes
    if len(facts.gpus.devices) > 1 and shared is not None and shared < LEAST_SHARED:
        yield Finding(
            "costs",
            f"/dev/shm holds {gb(shared)}.",
            "NCCL keeps what goes between GPUs there: it stops with an error, or the process with a bus error.",
            "Start the container with --shm-size=8g or --ipc=host."
            if facts.system.container
            else "Make it larger: mount -o remount,size=8G /dev/shm.",
        )


def _host_memory(facts: Facts) -> Found:
    memory, devices = facts.memory, facts.gpus.devices
    ranks = max(1, len(devices))
    least = ranks * LIBRARIES["cuda" if devices else "cpu"]
    if memory.limit_bytes and memory.limit_bytes < least + 1_000_000_000:
        yield Finding(
            "stops",
            f"{gb(memory.limit_bytes)} of memory for {counted(ranks, 'process', 'processes')}.",
            f"Each takes {gb(least // ranks)} for Python and its libraries alone: the system would kill a run.",
            "Give the machine more memory, or take fewer GPUs: plan.ranks=1.",
        )
    elif devices and memory.limit_bytes and memory.limit_bytes < sum(gpu.memory_bytes for gpu in devices):
        yield Finding(
            "note",
            f"the host has {gb(memory.limit_bytes)} of memory, less than its GPUs have together.",
            "Loading needs little of it, weights go to the GPU in pieces. plan.offload_base and the paged optimizers keep theirs there.",
            "`burnish plan` counts both.",
        )


def _limits(facts: Facts) -> Found:
    memory, system = facts.memory, facts.system
    if system.wsl:
        yield Finding(
            "note",
            f"Windows lets WSL have {gb(memory.limit_bytes)} of memory.",
            "That is half of the machine's unless .wslconfig says otherwise; pinned memory is limited too.",
            "To give it more: memory=48GB under [wsl2] in %UserProfile%\\.wslconfig on Windows, then wsl --shutdown.",
        )
    elif memory.limit_bytes < memory.total_bytes:
        yield Finding(
            "note",
            f"this process may use {gb(memory.limit_bytes)} of the {gb(memory.total_bytes)} of memory (cgroup).",
            "The plan goes by the smaller number. A process that takes more is killed without a word.",
            "A container gets more with --memory." if system.container else "",
        )
    if not memory.swap_bytes and memory.limit_bytes and memory.limit_bytes < 32e9:
        yield Finding("note", "there is no swap.", "A process that needs more memory than there is is killed at once.")


def _disks(facts: Facts) -> Found:
    for disk in facts.disks:
        where = f"{disk.path} ({disk.purpose})"
        if disk.problem is not None:
            ways = {"runs": "root=FOLDER puts runs elsewhere", "cache": "BURNISH_CACHE=FOLDER puts it elsewhere"}
            way = f"; {ways[disk.purpose]}." if disk.purpose in ways else "."
            yield Finding("stops", f"{where} cannot be written: {disk.problem}.", "A run ends there.", f"Change its permissions{way}")
        elif disk.free_bytes < LEAST_FREE:
            full = disk.free_bytes < LEAST_FREE // 50
            yield Finding(
                "stops" if full else "costs",
                f"{where} has {gb(disk.free_bytes)} free.",
                "Checkpoints, exports and quantized weights go there. A full disk ends a run; what was saved stays.",
                "Free some space, or put it on another disk with root=FOLDER and BURNISH_CACHE=FOLDER.",
            )
        slowest = min(disk.write_bytes_per_s or SLOW_DISK, disk.read_bytes_per_s or SLOW_DISK)
        if disk.problem is None and slowest < SLOW_DISK:
            windows = facts.system.wsl and disk.path.startswith("/mnt/")
            yield Finding(
                "costs",
                f"{where}: {slowest / 1e6:.0f} MB/s.",
                f"To read a base of 14 GB there takes {14e9 / slowest / 60:.0f} minutes." if slowest else "",
                "Put it inside WSL's own disk, not under /mnt." if windows else "Put it on a local disk.",
            )


def _files(facts: Facts) -> Found:
    count = facts.system.open_files
    if count is not None and (count > MANY_FILES or count < 0):  # -1: without a limit
        shown = "without limit" if count < 0 else f"{count:,}"
        yield Finding(
            "note", f"`ulimit -n` is {shown}.", "Some programs close that many files before they start another.", "ulimit -n 65536."
        )
    elif count is not None and count < FEW_FILES:
        yield Finding(
            "costs", f"`ulimit -n` is {count}.", "A model in many files, or many processes, may run out of it.", "ulimit -n 65536."
        )


def _token(facts: Facts) -> Found:
    offline = facts.system.environment.get("HF_HUB_OFFLINE", "") not in ("", "0")
    if not facts.system.hf_token and not offline:
        yield Finding(
            "note", "there is no Hugging Face token.", "Gated models (Llama, Gemma) cannot be downloaded; others can.", "hf auth login."
        )


def _kinds(facts: Facts) -> list[Gpu]:
    """One GPU of each name."""
    return [next(gpu for gpu in facts.gpus.devices if gpu.name == name) for name in Counter(gpu.name for gpu in facts.gpus.devices)]


RULES: tuple[Callable[[Facts], Found], ...] = (
    _requirements,
    _torch_without_cuda,
    _torch_sees_no_gpu,
    _old_driver,
    _kernels,
    _host_memory,
    _disks,
    _different,
    _taken,
    _half_precision,
    _lanes,
    _shared_memory,
    _peers,
    _limits,
    _files,
    _token,
)
