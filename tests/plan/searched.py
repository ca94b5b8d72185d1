"""Plans whose counts are real; what a step needs beside them is a formula here, since tracing takes a second."""

from pathlib import Path
from typing import Any

import pytest
import transformers

from burnish.config import Plan, RunConfig
from burnish.load.pretrained import Pretrained
from burnish.plan import changes as changing
from burnish.plan import decide as deciding
from burnish.plan import search as searching
from burnish.plan.decide import decide
from burnish.plan.gpus import GPUS
from burnish.plan.machine import Machine, with_pins
from burnish.plan.phases import Measure
from burnish.plan.report import Part, Phase, Report
from burnish.toml import parse_config

GB = 10**9
WIDE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000}
EIGHT = transformers.LlamaConfig(num_hidden_layers=8, max_position_embeddings=8192, **WIDE)
BASE = Pretrained("8 layers", Path(), None, EIGHT, False)  # 2 billion weights, 1 GB of them quantized, 0.5 GB in embeddings and head
MEASURE = Measure(BASE)
INPUT, WHOLE = 2 * EIGHT.hidden_size, 53 * EIGHT.hidden_size  # bytes that a layer keeps of a token: its input, or all (of a trace)


class Asks:
    """What was measured, in order."""

    def __init__(self) -> None:
        self.plans: list[Plan] = []

    def needed(self, config: RunConfig, plan: Plan, machine: Machine, measure: Measure) -> tuple[Phase, ...]:
        """The step on the device and on the host."""
        self.plans.append(plan)
        kept = measure.persistent(config.model, config.adapt, config.train, plan)
        tokens, layers = plan.micro_batch * config.data.context, EIGHT.num_hidden_layers
        again = 1 / plan.checkpoint_every if plan.checkpointing else 0
        waiting = round(layers * again * INPUT * tokens) if plan.offload_activations else 0
        activations = round(layers * (again * INPUT + (1 - again) * WHOLE) * tokens) - waiting
        moved = sum(kept.base_layers) if plan.offload_base else 0
        gathered = kept.root + 3 * kept.layer if plan.shards > 1 else 0
        step = (Part("weights", kept.total - moved), Part("gathered layers", gathered), Part("activations", activations))
        if plan.device == "cpu":
            return (Phase("train step", "memory", step, machine.device_bytes),)
        host = (Part("base in host memory", moved), Part("activations in host memory", waiting))
        return (Phase("train step", "GPU", step, machine.device_bytes), Phase("train step", "memory", host, machine.host_bytes))

    def loading(self, config: RunConfig, plan: Plan, machine: Machine, measure: Measure) -> tuple[Phase, ...]:
        """Weights on the device."""
        kept = measure.persistent(config.model, config.adapt, config.train, plan)
        weights = kept.total - (sum(kept.base_layers) if plan.offload_base else 0)
        return (Phase("load", "GPU", (Part("weights", weights),), machine.device_bytes),)


@pytest.fixture(autouse=True, name="asks")
def counted_by_formula(monkeypatch: pytest.MonkeyPatch) -> Asks:
    stub = Asks()
    monkeypatch.setattr(deciding, "Measure", lambda base, longest: MEASURE)
    for module in (searching, changing, deciding):
        monkeypatch.setattr(module, "needed", stub.needed)
    monkeypatch.setattr(changing, "loading", stub.loading)
    monkeypatch.setattr(deciding, "others", lambda *_: ())
    monkeypatch.setattr(changing, "run_folder", lambda *_: Phase("run folder", "disk", (), 1))
    monkeypatch.setattr(deciding, "with_afterwards", lambda config, plan, *_: plan)
    monkeypatch.setattr(changing, "unfit_afterwards", lambda *_: ())
    return stub


def gpus(count: int, gigabytes: float, kind: str = "3090", host: float = 128) -> Machine:
    return Machine("cuda", count, round(gigabytes * GB), round(host * GB), 16, GPUS[kind].bf16, "a GPU", GPUS[kind])


def asked(**sections: Any) -> RunConfig:
    return parse_config({"name": "x", "model": {"path": "8 layers"}, "data": {"context": 1024}} | sections)


def planned(machine: Machine, **sections: Any) -> tuple[Plan, Report]:
    config = asked(**sections)
    return decide(config, BASE, with_pins(machine, config.plan))


def deciding_plan() -> Plan:
    return Plan(
        device="cuda", ranks=1, strategy="single", dtype="bf16", micro_batch=1, accumulation=1, checkpointing=False
    )  # what `decide` begins with


def reason(report: Report, name: str) -> str:
    return next(decision.reason for decision in report.decisions if decision.name == name)


def overridden(sections: dict[str, Any], settings: str) -> dict[str, Any]:
    """The sections with what a change says: `model.format=nf4 data.context=512`."""
    sections = {"model": {"path": "8 layers"}, "data": {"context": 1024}, "train": {}, "adapt": {}} | sections
    for word in settings.split():
        key, _, value = word.partition("=")
        section, _, name = key.partition(".")
        sections[section][name] = {"true": True}.get(value, int(value) if value.isdigit() else value)
    return sections
