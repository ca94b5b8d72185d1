"""The frozen base in the hosts' memory under FSDP2, each rank its own rows: results are those without, bit for bit."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.config import AdaptConfig, ModelConfig, TrainConfig
from burnish.export.merge import merged_tensors
from burnish.model.network import packed
from burnish.parallel.outside import Together
from burnish.parallel.rows import local_rows, row_range
from burnish.parallel.world import world
from burnish.plan.bytes import ADAPTERS, FROZEN, meta, persistent
from burnish.skeleton import Built
from tests.model.test_offload import host_of
from tests.plan.test_trace import batch_of_lengths
from tests.ranks.jobs import Job, make_tokens, train_job
from tests.tiny import a_plan, built_from, tiny_folder

pytestmark = pytest.mark.ranks
LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("offload")
    tiny_folder(root / "model", "qwen2", num_hidden_layers=LAYERS)
    make_tokens(root / "tokens")
    return root


def moved(job: Job, **changes: Any) -> Job:
    return replace(job, run=f"{job.run}-moved", plan={"offload_base": True}, **changes)


CELLS = [
    ("fsdp", 2, "dora", "nf4", False),
    ("fsdp", 3, "dora", "nf4_double", True),
    ("hybrid", 4, "lora", "none", True),
    ("fsdp", 2, "expand", "int4", True),
]


@pytest.mark.parametrize(("strategy", "ranks", "method", "form", "checkpointing"), CELLS)
def test_losses_weights_and_bytes_are_bit_for_bit_those_without(folder, pool, strategy, ranks, method, form, checkpointing):
    """Training with dropout in fp32. 3 ranks do not divide the rows."""
    plain = Job(
        str(folder),
        run=f"{strategy}{ranks}{method}{form}",
        ranks=ranks,
        strategy=strategy,
        shard_ranks=2 if strategy == "hybrid" else 0,
        dtype="fp32",
        model={"format": form},
        adapt={"method": method, "dropout": 0.0 if method == "expand" else 0.1} | ({"new_blocks": 1} if method == "expand" else {}),
        checkpointing=checkpointing,
        train={"steps": 2},
    )
    expected = pool.run(ranks, train_job, plain)
    found = pool.run(ranks, train_job, moved(plain))
    for one, other in zip(expected, found, strict=True):
        assert other["records"] == one["records"]
        assert len(one["records"]) == 2
        for part in ("weights", "packed"):
            assert {name for name, tensor in one[part].items() if not torch.equal(other[part][name], tensor)} == set()


def test_a_run_that_is_killed_and_resumed_equals_the_uninterrupted_one_bit_for_bit(folder, pool):
    straight = moved(
        Job(
            str(folder), run="straight", ranks=2, strategy="fsdp", dtype="fp32", adapt={"dropout": 0.1}, train={"steps": 4}, rows_per_step=2
        )
    )
    broken = replace(straight, run="broken", break_after=3)
    expected = pool.run(2, train_job, straight)
    first, resumed = pool.run(2, train_job, broken), pool.run(2, train_job, replace(broken, break_after=None))
    for one, before, after in zip(expected, first, resumed, strict=True):
        assert before["records"][:2] + after["records"] == one["records"]
        assert {name for name, weight in one["weights"].items() if not torch.equal(after["weights"][name], weight)} == set()


def cached_job(job: Job, root: str) -> dict[str, Any]:
    before = os.environ.get("BURNISH_CACHE")
    os.environ["BURNISH_CACHE"] = root
    try:
        return train_job(job)["packed"]
    finally:
        os.environ.pop("BURNISH_CACHE") if before is None else os.environ.update(BURNISH_CACHE=before)


def test_the_quantized_cache_that_is_written_and_read_is_the_one_without(folder, pool, tmp_path):
    """Law 7 holds in the same fill: the shares are places like all others."""
    plain = Job(str(folder), run="cached", ranks=3, strategy="fsdp", dtype="fp32", model={"cache": True}, train={"steps": 1})
    starts = [(plain, "plain"), (moved(plain), "moved"), (replace(moved(plain), run="again"), "plain")]
    first, written, read = (pool.run(3, cached_job, job, str(tmp_path / root))[0] for job, root in starts)
    assert first.keys() == written.keys() == read.keys()
    assert all(torch.equal(tensor, written[name]) and torch.equal(tensor, read[name]) for name, tensor in first.items())
    one, other = (
        {path.relative_to(tmp_path / root): path.read_bytes() for path in (tmp_path / root).rglob("*.safetensors")}
        for root in ("plain", "moved")
    )
    assert one == other
    assert len(one) == LAYERS + 1


def order_job(folder: str, ranks: int, checkpointing: bool) -> dict[str, Any]:
    """What happens in one step, in order: rows that are sent for, and layers that begin to compute; and how often in a second step."""
    with world("cpu", ranks) as here:
        plan = a_plan(ranks=ranks, strategy="fsdp", checkpointing=checkpointing, offload_base=True)
        built = built_from(Path(folder) / "model", None, {}, plan, here)
        host, events, gathers = host_of(built), [], []
        real = Together.gather

        def gather(self: Together, pairs: Any) -> Any:
            given = list(pairs)
            starts = [flat.untyped_storage().data_ptr() for _, flat in given]
            slot = next(slot for slot in (0, 1) if starts[0] == host.slots[slot].data_ptr())
            gathers.append(len(given))
            events.append(("sent for", host.inside[slot]))
            return real(self, given)

        Together.gather = gather
        try:
            for number, layer in enumerate(built.layers):
                layer.self_attn.register_forward_pre_hook(lambda *_, number=number: events.append(("computes", number)))
            _step(built)
            once = len(gathers)
            _step(built)
        finally:
            Together.gather = real
        return {"events": events, "gathers": (once, len(gathers) - once), "copies": host.copies}


def _step(built: Built) -> None:
    with packed(built.model.train()):
        built.model.loss_of(batch_of_lengths((20, 30, 14))).backward()  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_layer_is_gathered_once_each_way_and_the_next_one_before_the_present_one_computes(folder, pool, checkpointing):
    forward = [("sent for", 0), ("sent for", 1), ("computes", 0), ("sent for", 2), ("computes", 1), ("sent for", 3)]
    forward += [("computes", 2), ("computes", 3)]
    back = [("computes", 3), ("sent for", 1), ("computes", 2), ("sent for", 0), ("computes", 1), ("computes", 0)]
    again = [("computes", 0), ("sent for", 2), ("computes", 1), ("sent for", 3), ("computes", 2), ("computes", 3)]
    if not checkpointing:  # a layer that keeps its activations is not run again
        back = [event for event in back if event[0] == "sent for"]
    for found in pool.run(2, order_job, str(folder), 2, checkpointing):
        assert found["events"] == forward + back + again + back, "the two layers that a pass ends with are there when the next begins"
        assert found["gathers"] == (4 + 2, 2 + 2)
        assert found["copies"] == sum(found["gathers"])


def held_job(folder: str, ranks: int) -> dict[str, Any]:
    """Bytes on this rank, and whether its rows of the base are FSDP2's; a comparison with a model that holds them on the device."""
    with world("cpu", ranks) as here:
        plan = a_plan(ranks=ranks, strategy="fsdp", dtype="fp32")
        plain = built_from(Path(folder) / "model", None, {}, plan, here)
        there = built_from(Path(folder) / "model", None, {}, replace(plan, offload_base=True), here)
        host = host_of(there)
        for built in (plain, there):
            train_a_little_sharded(built)
        names = {f"{name}.{part}" for name, linear in there.linears.items() for part in linear.names}
        rows = {
            name: (row_range(getattr(plain.linears[layer], part)), row_range(getattr(there.linears[layer], part)))
            for name in names
            for layer, _, part in (name.rpartition("."),)
        }
        pinned = {id(getattr(linear, name)) for linear in there.linears.values() for name in linear.names}
        left = [local_rows(tensor) for tensor in there.model.parameters() if id(tensor) not in pinned]
        merged = [
            (name, torch.equal(torch.cat(list(one)), torch.cat(list(other))))
            for (name, one), (_, other) in zip(merged_tensors(plain), merged_tensors(there), strict=True)
        ]
        prompt = torch.arange(2, 12)[None]
        answers = [built.model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=1) for built in (plain, there)]
        return {
            "device": sum(tensor.numel() * tensor.dtype.itemsize for tensor in (*left, *there.model.buffers())),
            "host": sum(len(flat) for flat in host.host),
            "slots": [len(slot) for slot in host.slots] + [len(host.share)],
            "rows": rows,
            "merged": merged,
            "answers": answers,
        }


def train_a_little_sharded(built: Built) -> None:
    """The same values on both models, whatever their rows here."""
    with torch.no_grad():
        for adapter in built.adapters.by_name.values():
            local_rows(adapter.b).fill_(0.01)
            assert adapter.m is not None
            local_rows(adapter.m).mul_(1.1)
    built.adapters.switch.advance()


@pytest.mark.parametrize("ranks", [2, 3])
def test_planned_bytes_are_those_of_a_rank_which_merges_and_answers_as_without(folder, pool, ranks):
    """Law 8, and what reads the base without running it."""
    found = pool.run(ranks, held_job, str(folder), ranks)
    config = built_from(folder / "model").model.config
    kept = persistent(meta(config, ModelConfig(path="tiny"), AdaptConfig(rank=8), a_plan()), TrainConfig(), ranks)
    assert found[0]["device"] == kept.of(*FROZEN, ADAPTERS) - sum(kept.moved.values())
    for here in found:
        assert here["host"] == sum(kept.base_shares)
        assert here["slots"] == [max(kept.base_layers), max(kept.base_layers), max(kept.base_shares)]
        assert {name for name, (one, other) in here["rows"].items() if one != other} == set()
        assert [name for name, same in here["merged"] if not same] == []
        assert torch.equal(*here["answers"])
