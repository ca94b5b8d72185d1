"""Law 8 for quantized embeddings and head, and for autocast: the trace of shapes against the same step on real tensors."""

from pathlib import Path
from typing import Any

import pytest

from tests.plan.test_trace import both, compare
from tests.tiny import a_plan

CELLS = [
    ("qwen2", {"ends": "int8"}, "bf16", False),
    ("gemma2", {"ends": "int4"}, "fp32", True),
    ("qwen2", {"autocast": "bf16"}, "fp32", True),
    ("llama", {"autocast": "fp16", "ends": "nf4"}, "fp32", False),
]


@pytest.mark.parametrize(("family", "model", "dtype", "checkpointing"), CELLS)
def test_a_traced_step_needs_what_the_real_one_needs(
    family: str, model: dict[str, Any], dtype: str, checkpointing: bool, tmp_path: Path
) -> None:
    plan = a_plan(dtype=dtype, checkpointing=checkpointing)
    compare(*both(tmp_path, family, plan, model), plan)
