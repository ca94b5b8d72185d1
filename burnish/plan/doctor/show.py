"""What a machine has, what that means for a run, and what is wrong: for a person."""

from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from burnish.plan.doctor.facts import Facts, as_values
from burnish.plan.doctor.rules import BF16, SEVERITIES, Finding, has_gpu
from burnish.words import counted, gb

NF4_BYTES = 0.5 + 4 / 64
"""Of one weight in nf4: 4 bits, and one fp32 scale for 64 weights."""
FOR_THE_BASE = 0.7
"""Share of the GPUs' memory that a base may take, so that activations, adapters and the CUDA context find room: a rule of thumb."""
STYLES = {"stops": "bold red", "costs": "yellow", "note": "dim"}


def as_json(facts: Facts, findings: tuple[Finding, ...]) -> dict[str, Any]:
    """The facts, which `facts_of` reads back once `means` and `findings` are taken out, and what was made of them."""
    return as_values(facts) | {"means": meaning(facts), "findings": [asdict(finding) for finding in findings]}


def render(facts: Facts, findings: tuple[Finding, ...]) -> RenderableType:
    """A table of facts, what they mean, and what is wrong, the worst first."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    for name, value in rows(facts):
        table.add_row(name, Text(value))
    parts: list[RenderableType] = [table, Text(), *(Text(line) for line in meaning(facts)), Text()]
    for finding in findings:
        parts.append(Text.assemble((f"{finding.severity}: ", STYLES[finding.severity]), finding.what))
        parts += [Text(f"       {line}", style="dim" if finding.severity == "note" else "") for line in (finding.means, finding.do) if line]
    said = ", ".join(f"{name}: {why}" for name, why in SEVERITIES.items())
    return Group(*parts, Text(f"({said})", style="dim") if findings else Text("Nothing is wrong.", style="green"))


def rows(facts: Facts) -> list[tuple[str, str]]:
    """(what, how much) of everything that was read."""
    found = [("system", facts.system.name + " (WSL)" * facts.system.wsl + " (container)" * facts.system.container)]
    found += [("versions", ", ".join(f"{name} {value or 'not installed'}" for name, value in facts.software.versions.items()))]
    build = f"CUDA {facts.software.torch_cuda}" if facts.software.torch_cuda else "CPUs alone"
    if facts.software.versions.get("torch"):
        found.append(("torch is built for", f"{build}; it sees {counted(facts.software.torch_gpus, 'GPU')}"))
    for number, gpu in enumerate(facts.gpus.devices):
        bf16 = "" if gpu.capability is None else ", bf16" if gpu.capability >= BF16 else ", no bf16"
        lanes = f", PCIe {gpu.pcie_generation or '?'} × {gpu.pcie_width}" if gpu.pcie_width else ""
        most = f" (at most {gpu.pcie_generation_max or '?'} × {gpu.pcie_width_max})" if lanes and gpu.pcie_width_max else ""
        taken = f", {gb(gpu.used_bytes)} taken" if gpu.used_bytes else ""
        found.append((f"GPU {number}", f"{gpu.name}, {gb(gpu.memory_bytes)}{bf16}{lanes}{most}{taken}"))
    if has_gpu(facts):
        found.append(("driver", facts.gpus.driver or "none"))
    if facts.gpus.p2p is not None:
        found.append(("P2P", "yes" if facts.gpus.p2p else "no"))
    memory = facts.memory
    limited = f", of which {gb(memory.limit_bytes)} for us" if memory.limit_bytes < memory.total_bytes else ""
    shared = f", /dev/shm {gb(memory.shared_bytes)}" if memory.shared_bytes is not None else ""
    found.append(("memory", f"{gb(memory.total_bytes)}{limited}, swap {gb(memory.swap_bytes)}{shared}"))
    found.append(("cores", str(facts.cores)))
    for disk in facts.disks:
        speeds = [("write", disk.write_bytes_per_s), ("read", disk.read_bytes_per_s)]
        speed = "".join(f", {name} {value / 1e6:.0f} MB/s" for name, value in speeds if value)
        found.append((f"disk of {disk.purpose}", f"{disk.path}: {disk.problem or f'{gb(disk.free_bytes)} free{speed}'}"))
    if facts.system.environment:
        found.append(("environment", " ".join(f"{name}={value}" for name, value in facts.system.environment.items())))
    return found


def meaning(facts: Facts) -> list[str]:
    """What a run does with this machine."""
    gpus = facts.gpus.devices
    if not (gpus and facts.software.torch_gpus):
        size = facts.memory.limit_bytes
        return [
            "A run takes the CPU, in fp32 and one process: right for trying things out, and for models of some hundred million weights. "
            f"It plans with {gb(size)} of memory."
        ]
    least = min(gpu.memory_bytes for gpu in gpus)
    all_bf16 = all(gpu.capability is None or gpu.capability >= BF16 for gpu in gpus)
    processes = "one process" if len(gpus) == 1 else f"{len(gpus)} processes, one for each GPU"
    total = FOR_THE_BASE * least * len(gpus) / NF4_BYTES / 1e9
    one = FOR_THE_BASE * least / NF4_BYTES / 1e9
    sizes = f"about {one:.0f} billion weights" if one >= 1 else f"about {one * 1000:.0f} million weights"
    sharded = f" on one GPU, {total:.0f} billion cut over all (fsdp)" if len(gpus) > 1 else ""
    return [
        f"A run takes {processes}, in {'bf16' if all_bf16 else 'fp16 with a scaled loss'}, and plans with {gb(least)} each.",
        f"By rule of thumb a base in nf4 may have {sizes}{sharded}; `burnish plan CONFIG.toml` counts it exactly.",
    ]
