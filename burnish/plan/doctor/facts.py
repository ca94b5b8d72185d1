"""What is known of a machine. None is what could not be read; nothing here is computed from anything else."""

from dataclasses import asdict, field
from typing import Any

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from burnish.errors import UserError
from burnish.runs import check_kind

KIND = "doctor/1"
STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class System:
    """The operating system and what it runs in."""

    name: str = ""
    wsl: bool = False
    container: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that change what a run does, of those in `probes.VARIABLES`. No secrets."""
    hf_token: bool = False
    """Whether there is a token for gated models. Its value is never read into this."""
    open_files: int | None = None
    """The soft limit, `ulimit -n`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Software:
    """Versions, and what torch says of itself."""

    versions: dict[str, str | None] = field(default_factory=dict)
    """None is not installed."""
    unmet: tuple[str, ...] = ()
    """Requirements of burnish that what is installed does not meet: `torch>=2.13`."""
    broken: dict[str, str] = field(default_factory=dict)
    """Packages that are installed and cannot be imported, with the last line of why."""
    torch_cuda: str | None = None
    """Version of CUDA that torch was built with; None is a build for CPUs."""
    torch_gpus: int = 0
    """GPUs that torch can use."""
    torch_kernels: tuple[str, ...] = ()
    """Architectures that this build of torch has kernels for: `sm_80`, `compute_90`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Gpu:
    """One GPU."""

    name: str
    memory_bytes: int
    used_bytes: int | None = None
    """Taken at this moment, by whichever program."""
    capability: tuple[int, int] | None = None
    pcie_width: int | None = None
    """Lanes at this moment."""
    pcie_width_max: int | None = None
    pcie_generation: int | None = None
    """At this moment: an idle GPU turns it down."""
    pcie_generation_max: int | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Gpus:
    """All GPUs of the machine, whether or not torch can use them."""

    devices: tuple[Gpu, ...] = ()
    on_bus: int = 0
    """NVIDIA's display devices on the PCI bus, where no tool says more."""
    driver: str | None = None
    p2p: bool | None = None
    """Whether every GPU reads every other's memory without the host. None where there are not two, or it cannot be asked."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Memory:
    """Memory of the host."""

    total_bytes: int = 0
    limit_bytes: int = 0
    """What this process may use of it: less than `total_bytes` in a container with a limit."""
    swap_bytes: int = 0
    shared_bytes: int | None = None
    """Size of /dev/shm."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Disk:
    """One folder that a run writes to."""

    purpose: str
    path: str
    free_bytes: int = 0
    write_bytes_per_s: float | None = None
    """Of one file of `probes.PROBE_BYTES`, with fsync."""
    read_bytes_per_s: float | None = None
    """Of the same file after the system was asked to forget it."""
    problem: str | None = None
    """Why it cannot be written to."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Facts:
    """One machine."""

    system: System = System()
    software: Software = Software()
    gpus: Gpus = Gpus()
    memory: Memory = Memory()
    cores: int = 0
    disks: tuple[Disk, ...] = ()


def as_values(facts: Facts) -> dict[str, Any]:
    """Plain JSON values, which `facts_of` reads back."""
    return {"burnish": KIND} | TypeAdapter(dict[str, Any]).dump_python(asdict(facts), mode="json")


def facts_of(values: dict[str, Any], name: str = "the profile") -> Facts:
    """Facts from plain values: a machine that is not here. Raises a `UserError` for values of another kind."""
    from pathlib import Path

    check_kind(Path(name), values.get("burnish"), KIND)
    try:
        return TypeAdapter(Facts).validate_python({key: value for key, value in values.items() if key != "burnish"})
    except ValueError as problem:
        raise UserError(f"{name} is no profile of a machine: {problem}") from None
