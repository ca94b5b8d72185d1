"""Machines that are not here, as `burnish doctor --json` would have read them. No figure of speed in them was measured."""

from typing import Any

from burnish.plan.doctor.facts import KIND, Facts, facts_of

GB = 10**9
GOOD = {
    "versions": {"python": "3.12.4", "burnish": "0.1.0", "torch": "2.13.0+cu130"},
    "torch_cuda": "13.0",
    "torch_kernels": ["sm_75", "sm_120"],
}
DISKS = [
    {"purpose": name, "path": f"some/{name}", "free_bytes": 500 * GB, "write_bytes_per_s": 1e9, "read_bytes_per_s": 3e9}
    for name in ("runs", "cache")
]


def gpu(name: str, gigabytes: int, capability: tuple[int, int], **more: Any) -> dict[str, Any]:
    lanes = {"pcie_width": 16, "pcie_width_max": 16, "pcie_generation": 4, "pcie_generation_max": 4}
    return {"name": name, "memory_bytes": gigabytes << 30, "used_bytes": 0, "capability": capability} | lanes | more


def machine(devices: list[dict[str, Any]], gigabytes: int, **more: Any) -> dict[str, Any]:
    """A sound machine with these GPUs and so much host memory; `more` changes parts of it."""
    base: dict[str, Any] = {
        "burnish": KIND,
        "system": {"name": "Linux-6.8", "hf_token": True, "open_files": 1024},
        "software": GOOD | {"torch_gpus": len(devices)},
        "gpus": {"devices": devices, "on_bus": len(devices), "driver": "580.95.05" if devices else None},
        "memory": {"total_bytes": gigabytes * GB, "limit_bytes": gigabytes * GB, "swap_bytes": 8 * GB, "shared_bytes": gigabytes * GB // 2},
        "cores": 16,
        "disks": DISKS,
    }
    return {
        name: (base[name] | more[name] if name in more and isinstance(base[name], dict) else more.get(name, base[name])) for name in base
    }


RTX4090 = gpu("NVIDIA GeForce RTX 4090", 24, (8, 9))
RTX3060 = gpu("NVIDIA GeForce RTX 3060", 12, (8, 6))
T4 = gpu("Tesla T4", 15, (7, 5), pcie_generation=3, pcie_generation_max=3)
A100 = gpu("NVIDIA A100-SXM4-80GB", 80, (8, 0))
WITHOUT_CUDA = {"versions": GOOD["versions"] | {"torch": "2.13.0+cpu"}, "torch_cuda": None, "torch_kernels": [], "torch_gpus": 0}

PROFILES: dict[str, dict[str, Any]] = {
    "2 × 4090": machine([RTX4090, RTX4090 | {"pcie_width": 4, "pcie_generation": 1}], 128, gpus={"p2p": False}),
    "3060 in WSL2": machine(
        [RTX3060 | {"used_bytes": 2 << 30}], 16, system={"wsl": True, "hf_token": False}, memory={"swap_bytes": 4 * GB}
    ),
    "T4 in a cloud": machine(
        [T4], 16, system={"container": True}, memory={"total_bytes": 64 * GB, "swap_bytes": 0, "shared_bytes": 64 << 20}
    ),
    "a laptop without a GPU": machine([], 16, software=WITHOUT_CUDA),
    "8 × A100": machine([A100] * 8, 1000, gpus={"p2p": True}),
    "torch without CUDA": machine([RTX4090], 64, software=WITHOUT_CUDA),
}


def profile(name: str) -> Facts:
    return facts_of(PROFILES[name])
