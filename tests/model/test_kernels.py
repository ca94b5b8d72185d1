"""The kernels for GPUs in Triton's interpreter, where it is installed; on a GPU `tests/gpu` holds every format to them."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from burnish import kernels

INTERPRETED = """
import torch
from burnish import kernels
from burnish.model.formats import FORMATS

generator = torch.Generator().manual_seed(0)
rows = torch.randn(5, 256, generator=generator)
kernels.usable = lambda tensor: False
plain = {(name, kind): form.dequantize(form.quantize(rows, 64, kind), 64, kind)
         for name, form in FORMATS.items() for kind in (torch.float32, torch.float16)}
kernels.usable, asked, real = lambda tensor: True, [], kernels.decode
kernels.decode = lambda *given, **named: asked.append(1) or real(*given, **named)
for (name, kind), right in plain.items():
    form = FORMATS[name]
    assert torch.equal(form.dequantize(form.quantize(rows, 64, kind), 64, kind), right), (name, kind)
print(len(asked))
a, b = (torch.randn(700, 300, generator=generator) for _ in range(2))
for one, other in ((a, b), (a[:, ::2], b[:, ::2]), (a[:1], b[:1])):
    right = (one.double() * other.double()).sum(0)
    assert (kernels.column_dots(one, other) - right).norm() <= 1e-6 * right.norm()
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_every_format_decodes_to_the_plain_forms_values_and_sums_are_those_of_float64():
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[0]) >= 2 * 9, "few formats asked for the kernel"


def test_without_a_compiler_all_runs_without_kernels(monkeypatch, caplog):
    def fails(*_, **__):
        raise RuntimeError("Failed to find C compiler\nmore")

    kernels._works.cache_clear()
    monkeypatch.setattr(kernels, "find_spec", lambda name: object())
    monkeypatch.setattr(kernels, "decode", fails)
    real = torch.arange, torch.ones
    monkeypatch.setattr(torch, "arange", lambda *given, device, **named: real[0](*given, **named))
    monkeypatch.setattr(torch, "ones", lambda *given, device, **named: real[1](*given, **named))
    try:
        assert not kernels._works()
        assert "Triton's kernels are not used, and decoding is slower: Failed to find C compiler" in caplog.text
        assert "more" not in caplog.text
        monkeypatch.setattr(kernels, "find_spec", lambda name: None)
        kernels._works.cache_clear()
        assert not kernels._works()
    finally:
        kernels._works.cache_clear()


@pytest.mark.parametrize(
    ("given", "release", "found"),
    [
        ({}, "6.8.0-generic", "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "6.8.0-generic", None),
        ({}, "5.15.167.4-microsoft-standard-WSL2", None),
    ],
)
def test_gpu_memory_comes_in_segments_that_grow_unless_the_environment_says_otherwise_or_it_is_wsl(given, release, found):
    without = {name: value for name, value in os.environ.items() if name not in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")}
    said = f"import platform; platform.release = lambda: {release!r}; import burnish, os; print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    asked = [sys.executable, "-c", said]
    done = subprocess.run(asked, env=without | given, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(found)
