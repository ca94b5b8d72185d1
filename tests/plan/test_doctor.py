"""`burnish doctor` says what a machine is, on machines that are not here; its probes survive whatever is not there."""

import builtins
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from burnish import cli
from burnish.errors import UserError
from burnish.plan.doctor import probes, rules
from burnish.plan.doctor.facts import Disk, Facts, Gpu, as_values, facts_of
from burnish.plan.doctor.rules import findings_of, stops
from burnish.plan.doctor.show import as_json, meaning, render
from burnish.plan.phases import PROCESS
from tests.plan.profiles import A100, GB, GOOD, PROFILES, RTX4090, T4, WITHOUT_CUDA, gpu, machine, profile


def said(facts: Facts) -> list[str]:
    """Each finding as one line."""
    return [f"{found.severity}: {found.what} {found.means} {found.do}" for found in findings_of(facts)]


def one(facts: Facts, word: str) -> str:
    """The only finding that has the word in it."""
    (found,) = [line for line in said(facts) if word in line]
    return found


@pytest.mark.parametrize(
    ("name", "expected", "prevented"),
    [
        ("2 × 4090", ["costs: GPU 1 (NVIDIA GeForce RTX 4090) has 4 PCIe lanes of 16.", "note: the GPUs do not read each other's"], False),
        (
            "3060 in WSL2",
            ["costs: 2.1 GB of the 12.9 GB of GPU 0", "note: Windows lets WSL have 16.0 GB", "note: there is no Hugging"],
            False,
        ),
        (
            "T4 in a cloud",
            ["costs: Tesla T4 has no bf16.", "note: the host has 16.0 GB", "note: this process may use 16.0 GB of the 64.0 GB", "no swap"],
            False,
        ),
        ("a laptop without a GPU", [], False),
        ("8 × A100", [], False),
        ("torch without CUDA", ["stops: there is an NVIDIA GPU, and torch 2.13.0+cpu is built for CPUs alone."], True),
    ],
)
def test_a_machine_gets_these_findings_and_no_others(name, expected, prevented):
    found = said(profile(name))
    # the laptop's memory is little, and a note on the 3060's host is due too: 16 GB are more than its 12.9
    assert len(found) == len(expected), found
    assert [part for part in expected if not any(part in line for line in found)] == []
    assert stops(findings_of(profile(name))) == prevented


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("2 × 4090", ["2 processes, one for each GPU, in bf16", "25.8 GB each", "32 billion weights on one GPU, 64 billion"]),
        ("3060 in WSL2", ["one process, in bf16", "12.9 GB"]),
        ("T4 in a cloud", ["in fp16 with a scaled loss"]),
        ("a laptop without a GPU", ["takes the CPU, in fp32", "16.0 GB"]),
        ("torch without CUDA", ["takes the CPU"]),
    ],
)
def test_what_a_machine_means_for_a_run(name, expected):
    text = " ".join(meaning(profile(name)))
    assert [part for part in expected if part not in text] == []


def test_the_cuda_that_torch_was_built_with_is_not_taken_for_one_that_works():
    blind = {"torch_gpus": 0}
    assert "no driver answers" in one(facts_of(machine([], 64, gpus={"on_bus": 1}, software=blind)), "stops")
    assert "on Windows, not inside WSL" in one(facts_of(machine([], 64, gpus={"on_bus": 1}, software=blind, system={"wsl": True})), "stops")
    assert "--gpus all" in one(facts_of(machine([], 64, gpus={"on_bus": 1}, software=blind, system={"container": True})), "stops")
    assert "(550.54) is older than 580, which torch's CUDA 13.0" in one(
        facts_of(machine([RTX4090], 64, gpus={"driver": "550.54"}, software=blind)), "stops"
    )
    hidden = {"environment": {"CUDA_VISIBLE_DEVICES": ""}}
    assert "CUDA_VISIBLE_DEVICES is ''" in one(facts_of(machine([RTX4090], 64, software=blind, system=hidden)), "stops")
    assert "restart the machine" in one(facts_of(machine([RTX4090], 64, software=blind)), "stops")


def test_a_driver_that_is_just_new_enough_is_no_finding_and_an_old_one_that_works_prevents_nothing():
    assert said(facts_of(machine([RTX4090], 64, gpus={"driver": "580.65"}))) == []
    assert said(facts_of(machine([RTX4090], 64, gpus={"driver": "535.1"}, software={"torch_cuda": "12.8"}))) == []
    assert one(facts_of(machine([RTX4090], 64, gpus={"driver": "535.1"})), "driver").startswith("costs")


def test_a_gpu_that_is_older_than_all_kernels_of_torch_stops_a_run():
    old = gpu("NVIDIA GeForce GTX 1080", 8, (6, 1))
    found = one(facts_of(machine([old], 64)), "kernel")
    assert found.startswith("stops")
    assert "6.1, older than all that torch was built for (7.5 and newer)" in found


def test_different_gpus_are_planned_to_be_like_the_smallest():
    facts = facts_of(machine([RTX4090, T4], 64))
    assert "planned to be like the smallest (16.1 GB)" in one(facts, "differ")
    assert "plans with 16.1 GB each" in meaning(facts)[0]


def test_an_idle_gpus_pcie_generation_is_a_note_and_few_lanes_cost():
    idle = facts_of(machine([RTX4090 | {"pcie_generation": 1}], 64))
    assert one(idle, "PCIe").startswith("note: GPU 0 (NVIDIA GeForce RTX 4090) is at PCIe generation 1 of 4.")
    assert said(facts_of(machine([RTX4090 | {"pcie_width": 8}], 64))) == []
    alone = one(facts_of(machine([RTX4090 | {"pcie_width": 1, "pcie_width_max": 1}], 64)), "lanes")
    assert "plan.offload_base and plan.offload_activations are slow" in alone


@pytest.mark.parametrize(
    ("change", "severity", "words"),
    [
        ({"memory": {"limit_bytes": 4 * GB}}, "stops", "4.0 GB of memory for 2 processes"),
        ({"memory": {"limit_bytes": 40 * GB}}, "note", "this process may use 40.0 GB of the 64.0 GB"),
        ({"memory": {"shared_bytes": 64 << 20}}, "costs", "/dev/shm holds 67 MB"),
        ({"memory": {"shared_bytes": 64 << 20}, "system": {"container": True}}, "costs", "--shm-size=8g"),
        ({"gpus": {"p2p": False}, "system": {"environment": {"NCCL_P2P_DISABLE": "1"}}}, "note", "NCCL_P2P_DISABLE=1 is set already"),
        ({"system": {"open_files": 1 << 30}}, "note", "`ulimit -n` is 1,073,741,824"),
        ({"system": {"open_files": 256}}, "costs", "`ulimit -n` is 256"),
        ({"software": {"unmet": ["torch>=2.13"]}}, "stops", "torch>=2.13 is needed, and torch 2.13.0+cu130 is"),
        ({"software": {"unmet": ["numpy>=2"]}}, "stops", "numpy>=2 is needed"),
        (
            {"software": {"broken": {"bitsandbytes": "OSError: libcudart.so"}}},
            "stops",
            "bitsandbytes cannot be imported: OSError: libcudart",
        ),
    ],
)
def test_a_fault_is_found_with_what_to_do(change, severity, words):
    # 64 GB of host memory for 51 GB of GPUs: nothing else is to be said
    found = one(facts_of(machine([RTX4090, RTX4090], 64, **change)), words)
    assert found.startswith(severity)
    assert not found.endswith(" ") or severity == "note"


@pytest.mark.parametrize(
    ("disk", "severity", "words"),
    [
        ({"problem": "Permission denied"}, "stops", "root=FOLDER puts runs elsewhere"),
        ({"free_bytes": 50_000_000}, "stops", "has 50 MB free"),
        ({"free_bytes": 3 * GB}, "costs", "has 3.0 GB free"),
        (
            {"path": "/".join(["", "mnt", "c", "runs"]), "write_bytes_per_s": 4e7},
            "costs",
            "40 MB/s. To read a base of 14 GB there takes 6 minutes.",
        ),
    ],
)
def test_a_disk_is_judged(disk, severity, words):
    facts = facts_of(machine([], 16, software=WITHOUT_CUDA, disks=[{"purpose": "runs", "path": "runs", "free_bytes": 500 * GB} | disk]))
    (found,) = said(facts)
    assert found.startswith(severity)
    assert words in found


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_is_read_back_from_what_is_printed_and_can_be_shown(name):
    facts = profile(name)
    assert facts_of(json.loads(json.dumps(as_values(facts)))) == facts
    values = json.loads(json.dumps(as_json(facts, findings_of(facts))))
    assert len(values["findings"]) == len(findings_of(facts))
    console = Console(width=140, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(render(facts, findings_of(facts)))
    shown = " ".join(console.export_text().split())
    assert [found.what for found in findings_of(facts) if " ".join(found.what.split()) not in shown] == []


def test_a_profile_of_another_kind_is_refused():
    with pytest.raises(UserError, match="newer burnish"):
        facts_of(PROFILES["8 × A100"] | {"burnish": "doctor/2"})
    with pytest.raises(UserError, match="is no profile of a machine"):
        facts_of(PROFILES["8 × A100"] | {"gups": {}})


def test_memory_of_a_process_is_what_the_plan_counts():
    assert rules.LIBRARIES == PROCESS


# --- probes


SMI = """NVIDIA GeForce RTX 4090, 24564, 1021, 8.9, 16, 16, 1, 4, 580.95.05
NVIDIA GeForce GTX 745, 4096, [N/A], [N/A], [N/A], 16, [N/A], [N/A], 580.95.05
a line of something else
"""


def test_what_nvidia_smi_prints_is_read_with_its_gaps():
    devices, driver = probes._by_nvidia_smi(SMI)
    assert driver == "580.95.05"
    assert devices[0] == Gpu(
        name="NVIDIA GeForce RTX 4090",
        memory_bytes=24564 << 20,
        used_bytes=1021 << 20,
        capability=(8, 9),
        pcie_width=16,
        pcie_width_max=16,
        pcie_generation=1,
        pcie_generation_max=4,
    )
    assert devices[1:] == (Gpu(name="NVIDIA GeForce GTX 745", memory_bytes=4096 << 20, pcie_width_max=16),)


def test_gpus_are_those_of_nvidia_smi_where_it_is_there(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{SMI}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert [found.name for found in probes.gpus().devices] == ["NVIDIA GeForce RTX 4090", "NVIDIA GeForce GTX 745"]


@pytest.mark.parametrize("text", ["exit 9", "sleep 9"], ids=["fails", "hangs"])
def test_a_program_that_fails_or_hangs_says_nothing(tmp_path, monkeypatch, text):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{text}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(probes, "SECONDS", 0.2)
    assert probes.said_by("nvidia-smi") == ""
    assert probes.said_by("no-such-program") == ""


def test_every_probe_survives_a_machine_that_answers_nothing(monkeypatch):
    real = builtins.__import__

    def refuses(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] in ("torch", "psutil", "huggingface_hub", "packaging"):
            raise ImportError(f"no {name}")
        return real(name, *rest, **more)

    def silent(*_: Any, **__: Any) -> Any:
        raise OSError("nothing")

    read_text = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, **more: read_text(path, **more) if "site-packages" in str(path) else silent())
    monkeypatch.setattr(builtins, "__import__", refuses)
    monkeypatch.setattr(probes, "import_module", lambda name: refuses("torch"))
    for module, name in ((probes.subprocess, "run"), (probes.shutil, "disk_usage"), (probes.os, "sched_getaffinity")):
        monkeypatch.setattr(module, name, silent)
    monkeypatch.setattr(Path, "iterdir", silent)
    monkeypatch.setattr(probes.tempfile, "mkstemp", silent)
    facts = probes.probe({"runs": Path("runs")})
    assert facts.software.broken.keys() >= {"torch", "transformers"}
    assert facts.gpus.devices == ()
    assert facts.disks == (Disk(purpose="runs", path="runs", problem="nothing"),)
    assert (facts.memory.total_bytes, facts.memory.shared_bytes) == (0, None)
    assert stops(findings_of(facts))


def test_a_disk_is_measured_where_the_folder_will_be_and_nothing_stays(tmp_path):
    found = probes.disk("runs", tmp_path / "not" / "yet")
    assert found.problem is None
    assert min(found.write_bytes_per_s or 0, found.read_bytes_per_s or 0) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_says_why(tmp_path):
    (tmp_path / "file").write_text("")
    assert probes.disk("runs", tmp_path / "file").problem == "Not a directory"


@pytest.mark.parametrize(("name", "code"), [("2 × 4090", 0), ("torch without CUDA", 1)])
def test_the_command_ends_with_1_where_something_prevents_a_run(name, code, monkeypatch, capsys):
    facts = profile(name)
    monkeypatch.setattr(probes, "probe", lambda places: facts)
    if code:
        with pytest.raises(SystemExit) as ended:
            cli.main(["doctor", "--json"])
        assert ended.value.code == code
    else:
        cli.main(["doctor", "--json"])
    assert json.loads(capsys.readouterr().out)["gpus"]["devices"][0]["name"] == "NVIDIA GeForce RTX 4090"


def test_the_command_speaks_of_this_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(probes, "PROBE_BYTES", 1_000_000)
    monkeypatch.setattr(probes, "gpus", lambda: Facts().gpus)
    monkeypatch.setenv("COLUMNS", "200")
    cli.main(["doctor", "--root", str(tmp_path / "runs")])
    shown = capsys.readouterr().out
    assert f"torch {GOOD['versions']['torch'].partition('+')[0]}" in shown  # this project's torch
    assert str(tmp_path / "runs") in shown
    assert list(tmp_path.glob("runs")) == []
    assert A100["name"] not in shown
