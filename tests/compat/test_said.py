"""What is said beside the settings, the TOML that is kept, and the original's printed commands as a whole."""

import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from burnish.compat.arguments import ARGUMENTS
from burnish.compat.choices import TRAIN_TYPES
from burnish.compat.command import fate_in_words, listing, translated
from burnish.compat.mapping import FATES, Becomes, NoEffect
from burnish.compat.translate import Translation, as_toml, checked, nested
from burnish.config import RunConfig
from burnish.errors import UserError
from tests.compat import commands
from tests.compat.expected import DEFAULT, DORA, LORA, NF4, expanded, printed, settings, translation


@pytest.mark.parametrize("name", [name for name, fate in FATES.items() if isinstance(fate, NoEffect)])
def test_an_argument_without_effect_says_so_where_it_is_given_and_not_where_it_is_not(name):
    default = ARGUMENTS[name].default
    other = {bool: str(not default), int: "7", str: "seven"}[ARGUMENTS[name].kind]
    (said,) = translation(f"--{name} {other}").ignored
    assert said == f"--{name} has no effect: {FATES[name].why}."
    assert translation("").ignored == []
    before, found = settings(""), settings(f"--{name} {other}")
    assert found | {"name": ""} == before | {"name": ""}


def test_dora_says_what_becomes_of_alpha_and_dropout_and_lora_does_not():
    told = " ".join(translation("--train_type bnb_dora --lora_alpha 128").differs)
    assert "ignored --lora_alpha and --lora_dropout: here alpha = rank and dropout 0" in told
    assert "deviation 1/√rank" in told
    assert "alpha" not in " ".join(translation("--train_type qlora").differs)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "rows are packed until a context is full"),
        ("--precision fp32", "computed in fp32"),
        ("--use_activation_cpu_offload true --use_gradient_checkpointing false", "without --use_gradient_checkpointing there are none"),
        ("--precision fp16_autocast --apply_gradient_clipping", "clipped them scaled"),
        ("--max_steps 3", "train.steps counts optimizer steps"),
        ("--num_epochs 2", "an order of its own"),
        ("--save_model true", "model_state_dict.safetensors"),
        ("--train_type hqq_lora --lora_target_modules default", "made the original fail"),
        ("--train_type hqq_llama_pro --llama_pro_path a_blk_exp-4-5", "The expanded folder is not read"),
        ("--sharding_strategy ddp", "--use_cpu_offload does nothing with this --sharding_strategy"),
        ("--use_cpu_offload true", "Only the frozen base is kept in host memory"),
        ("--train_type full", "with full nothing is frozen"),
        ("--profile", "One cycle of the profiler"),
    ],
)
def test_a_difference_is_said_where_it_is_one(line, words):
    without = {"": "--dataset dummy", "--use_cpu_offload true": "--use_cpu_offload false"}.get(line, "")
    assert words in " ".join(translation(line).differs)
    assert words not in " ".join(translation(without).differs)


def test_the_help_lists_every_argument_with_its_default_and_fate():
    text = listing()
    for name, argument in ARGUMENTS.items():
        assert f"--{name} " in text
        assert f"(default: {argument.default})" in text
        assert fate_in_words(name).split(": ")[0] in " ".join(text.split())


# --- TOML and the config


@pytest.mark.parametrize("line", ["", '--save_model true --output_dir "mo\\"dels/ü x" --train_type bnb_dora --dataset guanaco --profile'])
def test_the_toml_reads_back_as_the_settings(line):
    found = translation(line)
    assert tomllib.loads(as_toml(found)) == nested(found.settings)


def test_the_toml_says_above_the_settings_what_differs():
    found = translation("--train_type bnb_dora --verbose true")
    text = as_toml(found)
    comments = " ".join(line.removeprefix("#").removeprefix(" *").strip() for line in text.splitlines() if line.startswith("#"))
    assert all(" ".join(note.split()) in comments for note in (*found.differs, *found.ignored))
    assert found.ignored
    assert max(map(len, text.splitlines())) <= 140


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("train.lr", -1.0, "train.lr = -1.0: input should be greater than 0. It stands for --x y."),
        ("train.lr", "a = b: c", "train.lr = 'a = b: c': input should be a valid number"),
        ("train.log", ["stdout", "no such"], "train.log.1 = 'no such': input should be"),
        ("train.no_such", 1, "train.no_such: no such setting."),
        ("name", 3, "name = 3: input should be a valid string. It stands for --x y."),
    ],
)
def test_a_setting_that_burnish_refuses_is_told_with_the_argument_that_it_stands_for(setting, value, message):
    wrong = Translation({"name": "x", "model.path": "m"} | {setting: value}, {setting: "--x y"}, [], [])
    with pytest.raises(UserError) as refused:
        checked(wrong)
    (line,) = str(refused.value).splitlines()[1:]
    assert line.strip().startswith(message)
    assert line.endswith(" It stands for --x y.")


def test_an_unknown_setting_is_told_with_its_arguments():
    found = translation("--batch_size 2")
    assert found.origin["train.rows_per_step"] == found.origin["plan.micro_batch"] == "--batch_size 2 --gradient_accumulation_steps 1"
    assert set(found.origin) == set(found.settings)


KNOWN = {
    f"{section.name}.{entry.name}" if hasattr(section.type, "__dataclass_fields__") else section.name
    for section in fields(RunConfig)
    for entry in (fields(section.type) if hasattr(section.type, "__dataclass_fields__") else (section,))
}
NEW = sorted({name for fate in FATES.values() if isinstance(fate, Becomes) for name in fate.names} - KNOWN)


@pytest.mark.skipif(bool(NEW), reason=f"this config does not have {', '.join(NEW)}")
@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_the_config_takes_every_train_type(train_type):
    config = checked(translation(f"{expanded(train_type)} --save_model true --log_to wandb --profile --profile_memory true"))
    assert config.adapt.method == TRAIN_TYPES[train_type].method
    assert config.model.format == TRAIN_TYPES[train_type].format


@pytest.mark.skipif(bool(NEW), reason=f"this config does not have {', '.join(NEW)}")
@pytest.mark.parametrize("command", ["README_70B", "README_FULL", "README_HQQ", "COMPARISON", "SQL", "QDORA"])
def test_the_config_takes_the_printed_commands(command):
    assert checked(printed(getattr(commands, command))).model.path.startswith(("meta-llama/", "codellama/"))


@pytest.mark.skipif(bool(NEW), reason=f"this config does not have {', '.join(NEW)}")
def test_the_words_of_a_command_line_become_a_config_for_this_machine():
    text, config = translated(["--train_type", "qlora", "--batch_size", "3"])
    assert tomllib.loads(text)["plan"]["micro_batch"] == config.plan.micro_batch == 3


# --- commands as they are printed


def test_the_readmes_command_for_70b_on_two_gpus():
    found = printed(commands.README_70B).settings
    assert found.pop("name").startswith("qlora-Llama-2-70b-hf-")
    changed = {"model.path": "meta-llama/Llama-2-70b-hf", "plan.micro_batch": 2, "train.rows_per_step": 4, "data.sets": ["alpaca"]}
    assert found == {name: value for name, value in (DEFAULT | NF4 | LORA | changed).items() if name != "data.sets_limit"}


def test_the_qdora_articles_command_on_four_gpus_has_32_contexts_in_a_step():
    found = printed(commands.QDORA, gpus=4).settings
    changed = {
        "plan.micro_batch": 4,
        "train.rows_per_step": 32,
        "data.context": 2048,
        "data.sets": ["orca_math"],
        "data.sets_limit": 10000,
        "train.log": ["wandb"],
        "train.wandb_project": "fsdp-quantized-ft-exps",
        "root": "models",
        "name": "llama-7b-orca-math-10k-bnb-QDoRA",
        "export.writers": ["peft"],
        "plan.offload_base": False,
    }
    assert found == DEFAULT | NF4 | DORA | changed


def test_the_llama_pro_articles_commands_go_together(tmp_path):
    """The article gives train.py the folder in which block_expansion.py made one."""
    (tmp_path / "meta-llama" / "Llama-2-7b-hf_blk_exp-32-35").mkdir(parents=True)
    found = printed(commands.LLAMA_PRO.replace("/path/to/llama_pro_weights_directory", str(tmp_path)), gpus=4).settings
    assert (found["adapt.new_blocks"], found["adapt.method"], found["model.path"]) == (3, "expand", "meta-llama/Llama-2-7b-hf")


def test_the_other_printed_commands():
    full, hqq, sql = (printed(command) for command in (commands.README_FULL, commands.README_HQQ, commands.SQL))
    assert (full.settings["plan.ranks"], full.settings["train.rows_per_step"], full.settings["adapt.method"]) == (2, 64, "full")
    assert full.ignored == [f"--master_port has no effect: {FATES['master_port'].why}."]
    assert (hqq.settings["train.rows_per_step"], hqq.settings["model.bits"], hqq.settings["train.log"]) == (32, 4, ["stdout"])
    assert (sql.settings["train.clip"], sql.settings["data.context"], sql.settings["name"]) == (0.3, 256, "sql_model_qlora")
    compared = printed(commands.COMPARISON).settings
    assert (compared["train.schedule"], compared["train.lr"], compared["train.rows_per_step"]) == ("cosine", 2e-4, 32)


def test_several_machines_are_told_to_use_torchrun():
    with pytest.raises(UserError, match=r"--master_addr node-1: .*torchrun --rdzv-endpoint"):
        printed(commands.MULTI_NODE)


def test_every_command_on_the_page_is_understood(tmp_path, monkeypatch):
    (tmp_path / "llama_pro" / "x_blk_exp-32-35").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "from_fsdp_qlora.md").read_text(encoding="utf-8")
    shown = re.findall(r"^python train\.py (?:.*\\\n)*.*", page, re.MULTILINE)
    assert len(shown) == 3
    assert [printed(command).settings["adapt.method"] for command in shown] == ["dora", "lora", "expand"]
