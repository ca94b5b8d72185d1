"""Every argument of the original becomes just these settings, or says why it does not."""

import shlex
import tomllib
from dataclasses import fields
from typing import Any

import pytest

from burnish.compat import choices
from burnish.compat.arguments import ARGUMENTS, parse
from burnish.compat.choices import DATASETS, TRAIN_TYPES
from burnish.compat.command import fate_in_words, listing, translated
from burnish.compat.mapping import FATES, Becomes, NoEffect, Refused, With
from burnish.compat.translate import Translation, as_toml, checked, nested, translate
from burnish.config import RunConfig
from burnish.errors import UserError
from tests.compat import commands

SIX = ["k_proj", "q_proj", "v_proj", "up_proj", "down_proj", "gate_proj"]
NF4 = {"model.format": "nf4", "model.block": 64, "model.double_quantized": True}
HQQ = {"model.format": "hqq", "model.block": 64, "model.bits": 4}
LORA = {"adapt.method": "lora", "adapt.rank": 64, "adapt.alpha": 16.0, "adapt.dropout": 0.1, "adapt.targets": SIX}
DORA = {"adapt.method": "dora", "adapt.start": "normal", "adapt.rank": 64, "adapt.alpha": 64.0, "adapt.dropout": 0.0, "adapt.targets": SIX}
PRO = {"adapt.method": "expand", "adapt.new_blocks": 3}
OF_TYPE = {
    "full": {"model.format": "none", "adapt.method": "full"},
    "lora": {"model.format": "none"} | LORA,
    "custom_lora": {"model.format": "none"} | LORA,
    "qlora": NF4 | LORA,
    "custom_qlora": NF4 | LORA,
    "hqq_lora": HQQ | LORA,
    "bnb_dora": NF4 | DORA,
    "hqq_dora": HQQ | DORA,
    "bnb_llama_pro": NF4 | PRO,
    "hqq_llama_pro": HQQ | PRO,
}
DEFAULT = {
    "plan.micro_batch": 1,
    "train.rows_per_step": 2,
    "data.context": 512,
    "data.too_long": "split",
    "train.epochs": 1.0,
    "data.sets": ["alpaca_sample"],
    "data.sets_limit": 512,
    "plan.strategy": "fsdp",
    "plan.checkpointing": "layers",
    "plan.offload_base": False,
    "plan.offload_activations": False,
    "model.dtype": "bf16",
    "model.path": "meta-llama/Llama-2-7b-hf",
    "export.writers": [],
    "train.lr": 1e-5,
    "train.clip": 0.0,
    "train.weight_decay": 0.1,
    "train.optimizer": "adamw",
    "train.beta1": 0.9,
    "train.beta2": 0.95,
    "train.epsilon": 1e-5,
    "train.schedule": "constant",
    "train.warmup": 0.0,
    "train.log": ["tqdm"],
    "data.seed": 42,
    "adapt.seed": 42,
    "train.seed": 42,
    "root": "runs",
}
"""What no train type changes, on two GPUs; the run's name aside."""


def translation(line: str, gpus: int = 2, device: str = "cuda") -> Translation:
    return translate(parse(shlex.split(line)), gpus, device)


def settings(line: str, gpus: int = 2, device: str = "cuda") -> dict[str, Any]:
    return translation(line, gpus, device).settings


def printed(command: str, gpus: int = 2, device: str = "cuda") -> Translation:
    """Of a whole command as a shell reads it."""
    words = shlex.split(command.replace("\\\n", " "))  # shlex keeps the end of a line that a shell joins
    return translate(parse(words[next(at for at, word in enumerate(words) if word.endswith("train.py")) + 1 :]), gpus, device)


def problems(line: str) -> list[str]:
    with pytest.raises(UserError) as refused:
        settings(line)
    return [line.strip() for line in str(refused.value).splitlines()[1:]]


def test_every_argument_has_one_fate():
    assert set(FATES) == set(ARGUMENTS)
    assert len(FATES) == 54
    assert {type(fate) for fate in FATES.values()} == {Becomes, With, NoEffect, Refused}
    assert all(isinstance(FATES[fate.argument], Becomes) for fate in FATES.values() if isinstance(fate, With))
    assert all(fate.why for fate in FATES.values() if isinstance(fate, NoEffect | Refused))


def test_no_two_arguments_write_one_setting():
    names = [name for fate in FATES.values() if isinstance(fate, Becomes) for name in fate.names]
    assert len(names) == len(set(names))


def expanded(train_type: str) -> str:
    return f"--train_type {train_type}" + (" --llama_pro_path x_blk_exp-32-35" if "llama_pro" in train_type else "")


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_a_train_type_becomes_just_these_settings(train_type):
    found = settings(expanded(train_type))
    name = found.pop("name")
    assert found == DEFAULT | OF_TYPE[train_type]
    assert name.startswith(f"{train_type}-Llama-2-7b-hf-")


def test_only_the_settings_that_fates_name_are_written_and_all_of_them():
    named = {name for fate in FATES.values() if isinstance(fate, Becomes) for name in fate.names}
    more = "--profile --profile_memory --max_steps 4 --log_to wandb --world_size 3"
    lines = [expanded(train_type) for train_type in TRAIN_TYPES]
    lines += [f"--optimizer {optimizer} --dataset {__file__} {more}" for optimizer in choices.OPTIMIZERS]
    assert {name for line in lines for name in settings(line)} == named


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--batch_size 4 --gradient_accumulation_steps 3", {"plan.micro_batch": 4, "train.rows_per_step": 24}),
        ("--world_size 8", {"plan.ranks": 8, "train.rows_per_step": 8}),
        ("--world_size 1", {"plan.ranks": 1, "train.rows_per_step": 1, "plan.strategy": "single", "plan.offload_base": True}),
        ("--use_cpu_offload false", {}),
        ("--use_activation_cpu_offload true", {"plan.offload_activations": True}),
        ("--use_activation_cpu_offload true --use_gradient_checkpointing false", {"plan.checkpointing": "none"}),
        ("--use_gradient_checkpointing false", {"plan.checkpointing": "none"}),
        ("--context_length 2048", {"data.context": 2048}),
        ("--num_epochs 3", {"train.epochs": 3.0}),
        ("--dataset orca_math --dataset_samples 10000", {"data.sets": ["orca_math"], "data.sets_limit": 10000}),
        ("--dataset dummy", {"data.sets": ["dummy"], "data.sets_limit": 512}),
        ("--sharding_strategy ddp", {"plan.strategy": "ddp"}),
        ("--sharding_strategy shard_grad_op", {"plan.strategy": "fsdp-grad"}),
        ("--sharding_strategy hybrid_full_shard", {"plan.strategy": "hybrid"}),
        ("--sharding_strategy hybrid_shard_grad_op", {"plan.strategy": "hybrid-grad"}),
        ("--precision fp32", {"model.dtype": "fp32"}),
        ("--precision fp16_autocast", {"model.dtype": "fp16"}),
        ("--precision bf16_autocast", {}),
        ("--precision bf16_buffers_autocast", {}),
        ("--lora_rank 8 --lora_alpha 32 --lora_dropout 0", {"adapt.rank": 8, "adapt.alpha": 32.0, "adapt.dropout": 0.0}),
        ("--lora_target_modules default", {"adapt.targets": ["q_proj", "v_proj"]}),
        ("--lr 2e-4", {"train.lr": 2e-4}),
        ("--apply_gradient_clipping true", {"train.clip": 0.3}),
        ("--apply_gradient_clipping true --grad_norm 1", {"train.clip": 1.0}),
        ("--grad_norm 1", {}),
        ("--wd 0.5", {"train.weight_decay": 0.5}),
        ("--lr_scheduler linear", {"train.schedule": "linear", "train.warmup": 0.1}),
        ("--lr_scheduler cosine", {"train.schedule": "cosine", "train.warmup": 0.1}),
        ("--log_to stdout", {"train.log": ["stdout"]}),
        ("--log_to wandb --project_name p", {"train.log": ["wandb"], "train.wandb_project": "p"}),
        ("--project_name p", {}),
        ("--seed 7", {"data.seed": 7, "adapt.seed": 7, "train.seed": 7}),
        ("--profile_memory true", {"train.memory_snapshot": True}),
        ("--profile", {"train.profile": [7, 1, 2]}),
        ("--profile --repeat 1 --wait_steps 3", {"train.profile": [3, 1, 2]}),
        ("--profile --profiling_frequency 5 --warmup_steps 2 --active_steps 3", {"train.profile": [0, 2, 3]}),
        ("--max_steps 10", {"train.steps": 10}),
        ("--max_steps 10 --gradient_accumulation_steps 4", {"train.steps": 3, "train.rows_per_step": 8}),
        ("--max_steps 0", {"train.steps": 1}),
        ("--master_addr 127.0.0.1 --master_port 1", {}),
    ],
)
def test_an_argument_changes_just_its_own_settings(line, expected):
    before, found = settings(""), settings(line)
    assert found.pop("name") != before.pop("name")
    assert found == before | expected


@pytest.mark.parametrize("optimizer", choices.OPTIMIZERS)
def test_an_optimizer_has_the_originals_settings(optimizer):
    expected = {
        "adamw": {"train.beta1": 0.9, "train.beta2": 0.95, "train.epsilon": 1e-5, "train.weight_decay": 0.1},
        "adam": {"train.beta1": 0.9, "train.beta2": 0.999, "train.epsilon": 1e-8, "train.weight_decay": 0.0},
        "sgd": {"train.momentum": 0.0, "train.weight_decay": 0.0},
        "adadelta": {"train.rho": 0.9, "train.epsilon": 1e-6, "train.weight_decay": 0.0},
    }[optimizer.removeprefix("fused_")]
    found = settings(f"--optimizer {optimizer}")
    others = {"optimizer", "lr", "schedule", "warmup", "clip", "epochs", "rows_per_step", "log", "seed"}
    theirs = {name: value for name, value in found.items() if name.startswith("train.") and name.removeprefix("train.") not in others}
    assert theirs == expected
    assert found["train.optimizer"] == optimizer.removeprefix("fused_")


@pytest.mark.parametrize("name", DATASETS)
def test_a_set_that_the_original_took_whole_is_not_cut(name):
    assert ("data.sets_limit" in settings(f"--dataset {name}")) == (name in ("alpaca_sample", "dummy", "orca_math"))


def test_a_path_is_a_file_of_rows_and_a_name_with_one_a_local_copy(tmp_path, monkeypatch):
    (tmp_path / "mine.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    found = settings("--dataset mine.jsonl")
    assert found["data.rows"] == [str(tmp_path / "mine.jsonl")]
    assert not {"data.sets", "data.sets_limit"} & set(found)
    found = settings("--dataset orca_math=mine.jsonl")
    assert (found["data.sets"], found["data.sets_limit"]) == ([f"orca_math={tmp_path}/mine.jsonl"], 512)


def test_a_models_folder_is_named_whole_and_a_hub_id_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert settings("--model_name model")["model.path"] == str(tmp_path / "model")
    assert settings("--model_name owner/model")["model.path"] == "owner/model"


@pytest.mark.parametrize(
    ("line", "root", "name"),
    [
        ("--save_model true", ".", "output"),
        ("--save_model true --output_dir models/x", "models", "x"),
        ("--save_model true --output_dir models/x/", "models", "x"),
        ("--save_model true --output_dir /tmp/x", "/tmp", "x"),
    ],
)
def test_a_model_that_is_saved_is_saved_where_it_was_asked_for(line, root, name):
    found = settings(line)
    assert (found["root"], found["name"]) == (root, name)


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_what_is_saved_is_an_adapter_or_a_model(train_type):
    writer = "peft" if TRAIN_TYPES[train_type].method in ("lora", "dora") else "transformers"
    assert settings(f"{expanded(train_type)} --save_model true")["export.writers"] == [writer]


def test_two_command_lines_that_save_nothing_have_two_folders_and_one_has_one():
    assert settings("--lr 1")["name"] == settings("--lr=1.0")["name"] != settings("--lr 2")["name"]


def test_on_a_cpu_there_is_one_process_and_nothing_to_offload_from():
    found = settings("--use_activation_cpu_offload true", gpus=1, device="cpu")
    assert (found["plan.strategy"], found["train.rows_per_step"]) == ("single", 1)
    assert (found["plan.offload_base"], found["plan.offload_activations"]) == (False, False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--n_bits 2", "--n_bits 2: only the hqq train types have other widths than 4, not qlora"),
        ("--master_addr node-1", "--master_addr node-1: burnish starts the processes of one machine"),
        ("--world_size 0", "--world_size 0: a number of GPUs is expected, or -1 for all"),
        ("--dataset orca_maths", "--dataset orca_maths: no data set of the original's, and no file of rows. Did you mean orca_math?"),
        ("--train_type bnb_llama_pro", "--llama_pro_path is missing"),
        ("--profile --profiling_frequency 2", "--profiling_frequency 2: less than --warmup_steps 1 and --active_steps 2 take"),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_reason(line, message):
    (found,) = problems(line)
    assert found.startswith(message)


def test_everything_that_is_refused_is_told_at_once():
    assert len(problems("--n_bits 3 --master_addr far --dataset none_such --train_type hqq_llama_pro")) == 3
    assert len(problems("--n_bits 3 --master_addr far --dataset none_such")) == 3


def test_other_widths_are_hqqs():
    assert settings("--train_type hqq_dora --n_bits 2")["model.bits"] == 2


# --- what is said


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
        ("--precision bf16_autocast", "Under autocast they were held in fp32"),
        ("--use_activation_cpu_offload true --use_gradient_checkpointing false", "without --use_gradient_checkpointing there are none"),
        ("--precision fp16_autocast --apply_gradient_clipping", "clipped them scaled"),
        ("--lr_scheduler cosine", "falls to 0"),
        ("--max_steps 3", "train.steps counts optimizer steps"),
        ("--num_epochs 2", "an order of its own"),
        ("--save_model true", "model_state_dict.safetensors"),
        ("--train_type hqq_lora --lora_target_modules default", "made the original fail"),
        ("--train_type hqq_llama_pro --llama_pro_path a_blk_exp-4-5", "The expanded folder is not read"),
        ("--use_cpu_offload true", "on several GPUs the base is sharded"),
        ("--world_size 1", "Only the frozen base is kept in host memory"),
        ("--train_type full", "with full nothing is frozen"),
        ("--profile", "One cycle of the profiler"),
    ],
)
def test_a_difference_is_said_where_it_is_one(line, words):
    without = {"": "--dataset dummy", "--use_cpu_offload true": "--use_cpu_offload false", "--world_size 1": ""}.get(line, "")
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


def test_a_setting_that_burnish_refuses_is_told_with_the_argument_that_it_stands_for():
    wrong = Translation({"name": "x", "model.path": "m", "train.lr": -1.0}, {"train.lr": "--lr -1.0"}, [], [])
    with pytest.raises(UserError, match=r"train\.lr = -1\.0: input should be greater than 0\. It stands for --lr -1\.0\."):
        checked(wrong)


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
