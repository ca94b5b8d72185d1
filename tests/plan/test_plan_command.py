"""`burnish plan`: its flags, its table, its JSON, its picture; and what it refuses."""

import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from burnish import cli, pipeline
from burnish.errors import UserError
from burnish.plan.asked import asked_config
from burnish.plan.cost import Start, Step
from burnish.plan.machine import Machine, imagined_machine
from burnish.plan.picture import REST, check_drawable, draw, stacked
from burnish.plan.report import Candidate, Change, Decision, Need, Part, Phase, Report, enough_in_words
from tests.tiny import a_plan

GB = 10**9


def taking(gigabytes: int) -> Phase:
    return Phase("train step", "GPU", (Part("weights", gigabytes * GB),), 24 * GB)


def a_report(fits: bool = True, **changes: Any) -> Report:
    step = (Part("weights", 9 * GB, True), Part("activations", (4 if fits else 40) * GB), Part("crumbs", 1000))
    phases = (
        Phase("load", "GPU", step[:1], 24 * GB),
        Phase("train step", "GPU", step, 24 * GB),
        Phase("run folder", "disk", step, 90 * GB),
    )
    return Report(
        machine=Machine("cuda", 2, 24 * GB, 64 * GB, 8, True, "a GPU"),
        plan=a_plan(device="cuda"),
        decisions=(Decision("strategy", "single", "one process"),),
        phases=phases,
        changes=() if fits else (Change("data.context=9", taking(30), (Need("GPU", 30 * GB),)), Change("adapt.rank=8", taking(20))),
        candidates=(Candidate("chosen one", 1.0, "chosen", True, True), Candidate("another", 2.0, "step takes 40 GB", False, True)),
        step=Step(1.0, 0.5, 0.1, 8192),
        start=Start(60.0, 30.0, 10.0),
        **changes,
    )


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `burnish plan` asked for; it is answered with `decided["report"]`."""
    seen: dict[str, Any] = {"report": a_report()}

    def answer(config: Any, contexts: Any, machine: Any = None) -> Any:
        seen.update(config=config, machine=machine)
        return seen["report"].plan, seen["report"]

    monkeypatch.setattr(pipeline, "decided_for", answer)
    return seen


def words(*more: str) -> list[str]:
    return ["plan", "--model", "llama-3-70b", "--gpus", "2x24GB", "--ram", "64GB", "--context", "2048", *more]


def test_flags_alone_are_enough(decided: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(words("--method", "lora", "--rank", "64", "--batch", "4", "--format", "int4", "train.lr=1e-3"))
    config, machine = decided["config"], decided["machine"]
    assert (config.model.path, config.model.format, config.data.context) == ("meta-llama/Meta-Llama-3-70B", "int4", 2048)
    assert (config.adapt.method, config.adapt.rank, config.train.rows_per_step, config.train.lr) == ("lora", 64, 4, 1e-3)
    assert (machine.devices, machine.device_bytes, machine.host_bytes) == (2, 24 * GB, 64 * GB)
    said = capsys.readouterr().out
    assert "It fits: the training step leaves 11.0 GB to spare. The first step comes 90 s" in " ".join(said.split())
    assert "step takes 40 GB" in said


def test_a_plan_for_another_machine_writes_nothing(decided: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text('name = "x"\n[model]\npath = "meta-llama/Meta-Llama-3-70B"\n')
    cli.main(["plan", "run.toml", "--gpus", "1x4090"])
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]
    assert decided["machine"].name == "1 × RTX 4090"


def test_a_plan_of_a_file_is_kept_for_the_run(decided: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text('name = "x"\n[model]\npath = "meta-llama/Meta-Llama-3-70B"\n')
    cli.main(["plan", "run.toml", "--context", "512"])
    assert decided["config"].data.context == 512
    assert json.loads((tmp_path / "runs/x/2-plan/report.json").read_text())["step"]["tokens"] == 8192


def test_ways_that_were_not_measured_are_counted_and_make_no_empty_table(
    decided: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    others = tuple(Candidate(f"way {at}", 9.0, "slower, not measured", None, False) for at in range(2))
    decided["report"] = replace(a_report(), candidates=(a_report().candidates[0], *others))
    cli.main(words())
    said = capsys.readouterr().out
    assert "also tried" not in said
    assert "2 other ways, slower by estimate: `burnish plan --json` lists them" in " ".join(said.split())


@pytest.mark.parametrize("anyway", [False, True])
def test_what_does_not_fit_ends_with_2_unless_it_is_to_be_tried(
    decided: dict[str, Any], anyway: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    decided["report"] = a_report(fits=False)
    if anyway:
        cli.main(words("--anyway"))
    else:
        with pytest.raises(SystemExit) as ended:
            cli.main(words())
        assert ended.value.code == 2
    said = capsys.readouterr()
    words_said = " ".join(said.out.split())
    assert "The smallest change that makes it fit: adapt.rank=8: 20.0 GB of 24.0 GB GPU (train step), fits." in words_said
    assert "As asked, training would fit with 49.1 GB on each GPU." in words_said
    assert ("--anyway" in said.err) != anyway


@pytest.mark.parametrize("command", ["run", "train"])
def test_anyway_is_a_flag_of_the_commands_that_train(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    outcome = types.SimpleNamespace(interrupted=False)
    monkeypatch.setattr(pipeline, "trained", lambda config, run: seen.append(config.plan.anyway) or outcome)
    monkeypatch.setattr(pipeline, "run_all", lambda config, run, progress: seen.append(config.plan.anyway) or outcome)
    monkeypatch.setattr("burnish.summary.print_summary", lambda run: None)
    (tmp_path / "run.toml").write_text(f'name = "x"\nroot = "{tmp_path}"\n[model]\npath = "x/y"\n')
    cli.main([command, str(tmp_path / "run.toml"), "--anyway"])
    cli.main([command, str(tmp_path / "run.toml")])
    assert seen == [True, False]


def test_the_report_is_printed_as_json(decided: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(words("--json"))
    values = json.loads(capsys.readouterr().out)
    assert values["fits"] is True
    assert [one["verdict"] for one in values["candidates"]] == ["chosen", "step takes 40 GB"]
    assert values["start"]["first"] == 30.0


@pytest.mark.parametrize(("ram", "said"), [(None, True), ("64GB", False)])
def test_another_machine_without_its_memory_is_said_to_have_this_ones(ram: str | None, said: bool) -> None:
    found = pipeline.decided_for(asked_config(None, (), {"model": "smollm2-135m"}), None, imagined_machine("1x4090", ram))[1]
    reasons = {decision.name: decision.reason for decision in found.decisions}
    assert ("host memory" in reasons) == said
    assert not said or "this machine's, since none was given: --ram" in reasons["host memory"]


def test_more_of_the_same_is_not_said_to_be_enough_too() -> None:
    def said(*instead: Need) -> str:
        return enough_in_words(a_report(fits=False, instead=instead))

    assert said().startswith("As asked, training would fit with 49.1 GB on each GPU")
    assert ", or with" not in said(Need("GPU", 49 * GB + 1000), Need("memory", 90 * GB))
    assert ", or with 90.0 GB of memory on each machine" in said(Need("memory", 90 * GB))


def test_no_model_is_refused() -> None:
    with pytest.raises(UserError, match="of which model"):
        asked_config(None, (), {"context": 512})


def test_an_override_may_stand_where_no_file_does() -> None:
    assert asked_config(Path("data.context=512"), (), {"model": "smollm2-135m"}).data.context == 512


# --- the picture


def test_small_parts_are_drawn_as_one_and_nothing_is_lost() -> None:
    bars = list(a_report().phases)
    drawn = stacked(bars)
    assert list(drawn) == ["weights", "activations", REST]
    assert [sum(sizes[place] for sizes in drawn.values()) for place in range(3)] == [phase.bytes / 1e9 for phase in bars]


def test_a_part_that_is_much_of_a_small_bar_is_drawn_by_its_name() -> None:
    huge = Phase("save", "memory", (Part("moments", 1000 * GB),), 2000 * GB)
    assert list(stacked([*a_report().phases, huge])) == ["weights", "activations", "moments", REST]


def test_without_matplotlib_the_way_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install matplotlib \(burnish's extra `plots` has it\)\."):
        check_drawable(tmp_path / "plan.png")


def test_an_ending_that_is_no_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--picture .*plan\.txt: the ending says the format"):
        check_drawable(tmp_path / "plan.txt")
    with pytest.raises(UserError, match=r"there is no folder .*nowhere that can be written to\. Make it, or name another"):
        check_drawable(tmp_path / "nowhere" / "plan.png")


def test_memory_is_drawn_bar_by_bar_and_the_disk_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, Any]] = []

    class Axes:
        def __getattr__(self, name: str) -> Any:
            return lambda *args, **settings: drawn.append((name, (args, settings)))

    class Figure:
        def __init__(self, **_: Any) -> None:
            pass

        def subplots(self) -> Axes:
            return Axes()

        def savefig(self, path: Path, **settings: Any) -> None:
            path.write_text(settings["format"])

    monkeypatch.setitem(sys.modules, "matplotlib.figure", types.SimpleNamespace(Figure=Figure))
    draw(a_report(), tmp_path / "plan.svg", "some/model")
    assert (tmp_path / "plan.svg").read_text() == "svg"
    bars = [(args[1], settings["bottom"]) for name, (args, settings) in drawn if name == "bar"]
    assert bars[:2] == [([9.0, 9.0], [0.0, 0.0]), ([0.0, 4.0], [9.0, 9.0])]
    assert [args[1] for name, (args, _) in drawn if name == "set_xticks"] == [["load\n(GPU)", "train step\n(GPU)"]]
    assert [args[0] for name, (args, _) in drawn if name == "set_title"] == ["some/model on a GPU\nsingle on 1: fits"]
