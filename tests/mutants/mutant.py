"""Faults that the suite must notice: each a change of one place in the package, and the tests that must fail with it.

A row names few and fast tests (1 to 3 seconds), not all that would notice.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """In `file` of the package, `old` becomes `new`; then one of `tests` (files, or `file::test`) must fail."""

    fault: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    keyword: str = ""
    """As for `pytest -k`."""


ADAPTER, PEFT, FORMATS, LINEAR = "adapt/test_adapter.py", "adapt/test_against_peft.py", "model/test_formats.py", "model/test_linear.py"
AFFINE = "model/test_affine.py"
HEAD, FAMILIES, FILL, CACHE = "model/test_head.py", "model/test_families.py", "load/test_fill.py", "load/test_cache.py"
METHODS, NORMS = "adapt/test_methods.py", "model/test_norms.py"
MIXTURE, SETS, NUMBER = "data/test_mixture.py", "data/test_named_sets.py", "evaluate/test_number.py"
RUNS, CONFIG, TRAIN = "test_runs.py", "test_config.py", "train/test_training.py"
OPTIMIZERS, FP16, OFFLOAD = "train/test_optimizers.py", "train/test_fp16.py", "model/test_offload.py"
ROWS = "data/test_conversations.py"
TRACE = "plan/test_trace.py"
