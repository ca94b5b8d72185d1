"""train.py and scripts/block_expansion.py are the original's command lines; `burnish compat` shows what they would do, and runs nothing."""

import json
import os
import runpy
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from burnish import cli
from burnish.compat import command
from burnish.compat.arguments import ARGUMENTS, parse
from burnish.compat.translate import Translation, translate
from burnish.runs import Run
from tests.compat.test_said import NEW
from tests.tiny import tiny_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRANSFORMERS_VERBOSITY", "TOKENIZERS_PARALLELISM"):  # that the command line sets
        monkeypatch.setenv(name, os.environ.get(name, "error"))
    monkeypatch.chdir(tmp_path)


def script(name: str, *words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [name, *words])
    runpy.run_path(str(ROOT / name), run_name="__main__")


@pytest.fixture
def only_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings that this config has, so that what surrounds the translation can be tried without the others."""

    def known(*args: Any) -> Translation:
        found = translate(*args)
        kept = {name: value for name, value in found.settings.items() if name not in NEW}
        kept |= {"model.format": "nf4", "train.log": ["stdout"], "plan.strategy": "single"}
        return Translation(kept, found.origin, found.differs, found.ignored)

    monkeypatch.setattr(command, "translate", known)


def test_the_help_of_train_py_is_the_list_of_arguments(capsys, monkeypatch):
    script("train.py", "--help", monkeypatch=monkeypatch)
    assert capsys.readouterr().out == command.listing()


def test_a_mistake_ends_with_its_message_and_exit_code_2(capsys, monkeypatch):
    with pytest.raises(SystemExit, match="2"):
        script("train.py", "--batchsize", "2", monkeypatch=monkeypatch)
    assert capsys.readouterr().err == "error: 1 problem with the arguments\n  --batchsize: no such argument. Did you mean batch_size?\n"


def test_compat_prints_the_config_and_makes_nothing(capsys, only_known, tmp_path):
    cli.main(["compat", "--model_name", "some/model", "--lr", "3e-4"])
    config = tomllib.loads(capsys.readouterr().out)
    assert (config["model"]["path"], config["train"]["lr"]) == ("some/model", 3e-4)
    assert list(tmp_path.iterdir()) == []


def test_train_py_trains_in_its_own_folder_and_keeps_the_config_there(capsys, only_known, tmp_path, monkeypatch):
    tiny_folder(tmp_path / "model")
    rows = [{"instruction": f"When does boat {number} leave?", "output": f"at {number}"} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = "--model_name model --dataset rows.jsonl --context_length 128 --train_type bnb_dora --precision fp32 --save_model true"
    script("train.py", *words.split(), "--max_steps=2", "--lora_rank", "4", monkeypatch=monkeypatch)
    assert capsys.readouterr().out.startswith("# fsdp_qlora's arguments as a burnish config")
    run = Run(tmp_path / "output")
    adapter = load_file(run.stage("train") / "adapter" / "adapter_model.safetensors")
    assert {value.shape[0] for name, value in adapter.items() if "lora_A" in name} == {4}
    assert not any("o_proj" in name for name in adapter)
    assert (run.stage("export") / "peft" / "adapter_config.json").is_file()
    kept = (run.folder / "run.toml").read_text()
    assert tomllib.loads(kept)["adapt"]["start"] == "normal"
    with pytest.raises(SystemExit, match="2"):
        script("train.py", *words.split(), "--max_steps=3", "--lora_rank", "4", monkeypatch=monkeypatch)
    assert "was trained with other settings, and is never overwritten" in capsys.readouterr().err
    assert (run.folder / "run.toml").read_text() == kept


def test_block_expansion_py_expands_by_its_rate(capsys, monkeypatch, tmp_path):
    asked = []
    stand_in = SimpleNamespace(expand_folder=lambda *args: asked.append(args))
    monkeypatch.setitem(sys.modules, "burnish.export.expanded_folder", stand_in)
    tiny_folder(tmp_path / "owner" / "model", num_hidden_layers=4)
    words = ("--model_name", "owner/model", "--output_dir", "out", "--expansion_rate", "0.5")
    script("scripts/block_expansion.py", *words, monkeypatch=monkeypatch)
    folder = Path("out/owner/model_blk_exp-4-6")
    assert asked == [("owner/model", folder, 2)]
    given = parse(["--train_type", "bnb_llama_pro", "--llama_pro_path", str(folder)])
    assert translate(given, 1).settings["adapt.new_blocks"] == 2
    assert f"--llama_pro_path {folder}" in capsys.readouterr().out


def test_import_writes_the_folder_and_says_what_it_is(capsys, tmp_path):
    weights = load_file(tiny_folder(tmp_path / "model") / "model.safetensors")
    block = {name.replace("layers.1.", "layers.2."): value for name, value in weights.items() if ".layers.1." in name}
    save_file(block, tmp_path / "s.safetensors")
    cli.main(["import", "s.safetensors", "out", "--model", "model", "model.format=none"])
    assert capsys.readouterr().out == "out: a model of 3 layers, of which 2 are the trained blocks\n"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 3


def test_the_page_tells_of_every_argument():
    page = (ROOT / "docs" / "from_fsdp_qlora.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip().strip("`"): line for line in page.splitlines() if line.startswith("| `--")}
    assert set(rows) == {f"--{name}" for name in ARGUMENTS}
    for name, argument in ARGUMENTS.items():
        assert f"| {str(argument.default).lower() if isinstance(argument.default, bool) else argument.default} |" in rows[f"--{name}"]
        for setting in getattr(command.FATES[name], "names", ()):
            assert f"`{setting}`" in rows[f"--{name}"], (name, setting)


def test_import_refuses_a_setting_that_there_is_not(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["import", "s.safetensors", "out", "--model", "model", "model.fromat=nf4"])
    assert "burnish import: 1 problem\n  model.fromat: no such setting. Did you mean format?" in capsys.readouterr().err
