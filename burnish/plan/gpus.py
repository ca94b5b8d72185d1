"""GPUs by name: what they hold and how fast they are, from their vendor's data sheets.

One was measured, an H100: 750 TFLOP/s and 3.0 TB/s (docs/performance.md).
"""

import re
from dataclasses import dataclass, replace

from burnish.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    name: str
    gib: float
    """Memory that CUDA lets programs have, as its out-of-memory messages name it ("a total capacity of …"), rounded down."""
    teraflops: float
    """Dense bf16 (fp16 before Ampere) on tensor cores, summed in fp32: GeForce cards do that at half their fp16 rate."""
    gigabytes_per_second: float
    """Of its own memory."""
    pcie: int = 4
    lanes: int = 16
    nvlink: float = 0.0
    """GB/s to other GPUs of the machine, in one direction. 0 where they talk over PCIe."""
    bf16: bool = True

    @property
    def bytes(self) -> int:
        return round(self.gib * 2**30)


GPUS: dict[str, Gpu] = {
    # GeForce: NVIDIA's architecture white papers (Turing, GA102, Ada, RTX Blackwell), table "GPU specifications"
    "2080ti": Gpu("RTX 2080 Ti", 10.7, 53.8, 616, pcie=3, bf16=False),
    "3060-12": Gpu("RTX 3060", 11.6, 25.5, 360),
    "3070": Gpu("RTX 3070", 7.6, 40.6, 448),
    "3080-10": Gpu("RTX 3080", 9.6, 59.5, 760),
    "3080-12": Gpu("RTX 3080", 11.6, 61.3, 912),
    "3080ti": Gpu("RTX 3080 Ti", 11.6, 68.2, 912),
    "3090": Gpu("RTX 3090", 23.5, 71.0, 936),
    "3090ti": Gpu("RTX 3090 Ti", 23.5, 80.0, 1008),
    "4060ti-16": Gpu("RTX 4060 Ti", 15.5, 44.1, 288, lanes=8),
    "4070": Gpu("RTX 4070", 11.6, 58.3, 504),
    "4080": Gpu("RTX 4080", 15.5, 97.5, 717),
    "4090": Gpu("RTX 4090", 23.5, 165.2, 1008),
    "5070ti": Gpu("RTX 5070 Ti", 15.4, 87.9, 896, pcie=5),
    "5080": Gpu("RTX 5080", 15.4, 112.6, 960, pcie=5),
    "5090": Gpu("RTX 5090", 31.3, 209.5, 1792, pcie=5),
    # workstation and data centre: each one's data sheet
    "a4000": Gpu("RTX A4000", 15.6, 76.7, 448),
    "a5000": Gpu("RTX A5000", 23.5, 111.1, 768),
    "a6000": Gpu("RTX A6000", 47.4, 154.8, 768),
    "6000ada": Gpu("RTX 6000 Ada", 47.3, 364.2, 960),
    "t4": Gpu("T4", 14.5, 65.0, 320, pcie=3, bf16=False),
    "v100-16": Gpu("V100", 15.7, 125.0, 900, pcie=3, nvlink=150, bf16=False),
    "v100-32": Gpu("V100", 31.7, 125.0, 900, pcie=3, nvlink=150, bf16=False),
    "a10": Gpu("A10", 22.0, 125.0, 600),
    "a10g": Gpu("A10G", 22.0, 70.0, 600),
    "a40": Gpu("A40", 44.3, 149.7, 696),
    "l4": Gpu("L4", 21.9, 121.0, 300),
    "l40s": Gpu("L40S", 44.3, 362.0, 864),
    "a100-40": Gpu("A100", 39.3, 312.0, 1555, nvlink=300),
    "a100-80": Gpu("A100", 79.1, 312.0, 2039, nvlink=300),
    "h100": Gpu("H100", 79.1, 989.0, 3350, pcie=5, nvlink=450),
    "h200": Gpu("H200", 139.7, 989.0, 4800, pcie=5, nvlink=450),
}
"""By the name that `--gpus` takes; `-16` tells the sizes of one name apart. A100, H100, H200 and V100 are the SXM ones."""

UNNAMED = "3090"
"""The speed that is taken for a GPU of which only the memory is known."""

_NOISE = re.compile(r"nvidia|geforce|quadro|tesla|rtx|generation|\bgpu\b|[\s_]")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)(gb|gib)")


def parse_gpus(text: str) -> tuple[int, Gpu, int]:
    """(how many, what kind, bytes of one) of `2x4090`, `8xa100-40`, `2x24GB` (10^9 bytes), `1x24GiB`, `3090`.

    Raises a `UserError` for what names no machine.
    """
    words = re.fullmatch(r"(?:(\d+)\s*[x×*]\s*)?(\S.*)", text.strip().lower())
    if words is None or "," in text or "+" in text:
        raise UserError(f"--gpus {text!r}: write how many of what, such as 2x4090 or 2x24GB. A plan takes all to be like the smallest.")
    count, kind = int(words[1] or 1), words[2]
    if not count:
        raise UserError(f"--gpus {text!r}: no GPU at all is `--gpus none`.")
    if size := _SIZE.fullmatch(kind):
        memory = round(float(size[1]) * (10**9 if size[2] == "gb" else 2**30))
        if not memory:
            raise UserError(f"--gpus {text!r}: a GPU without memory holds nothing. Write 24GB for one of 24 GB.")
        return count, GPUS[UNNAMED], memory
    found = _named(kind)
    if len(found) > 1:
        raise UserError(f"--gpus {text!r}: there are several kinds of it. Write {' or '.join(found)}.")
    if not found:
        raise UserError(f"--gpus {text!r}: no such GPU is known.{did_you_mean(_plain(kind), list(GPUS))} Its memory alone will do: 1x24GB.")
    return count, GPUS[found[0]], GPUS[found[0]].bytes


def like(name: str, total_bytes: int) -> Gpu | None:
    """The row for a GPU that CUDA calls `name` (`NVIDIA A100-SXM4-80GB`), by name and, among several, memory; None where none is."""
    if "laptop" in name.lower():
        return None
    word = _plain(re.sub(r"[\s-](sxm\d*|pcie|hbm\d*e?|\d+gb)\b", "", name.lower())).replace("-", "")
    found = [gpu for key, gpu in GPUS.items() if key.partition("-")[0] == word]
    closest = min(found, key=lambda gpu: abs(gpu.bytes - total_bytes), default=None)
    return replace(closest, nvlink=0.0) if closest and "pcie" in name.lower() else closest


def _named(kind: str) -> list[str]:
    word = _plain(kind).removesuffix("gb")
    if word in GPUS:
        return [word]
    return [key for key in GPUS if word in (key.partition("-")[0], key.replace("-", ""))]


def _plain(name: str) -> str:
    return _NOISE.sub("", name.lower())
