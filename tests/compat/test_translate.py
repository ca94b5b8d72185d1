"""Every argument of the original becomes just these settings."""

import pytest

from burnish.compat import choices
from burnish.compat.arguments import ARGUMENTS
from burnish.compat.choices import DATASETS, TRAIN_TYPES
from burnish.compat.mapping import FATES, Becomes, NoEffect, Refused, With
from burnish.errors import UserError
from tests.compat.expected import DEFAULT, OF_TYPE, expanded, settings


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


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_a_train_type_becomes_just_these_settings(train_type):
    found = settings(expanded(train_type))
    name = found.pop("name")
    assert found == DEFAULT | OF_TYPE[train_type]
    assert name.startswith(f"{train_type}-Llama-2-7b-hf-")


def test_only_the_settings_that_fates_name_are_written_and_all_of_them():
    named = {name for fate in FATES.values() if isinstance(fate, Becomes) for name in fate.names}
    more = "--profile --profile_memory --max_steps 4 --log_to wandb --world_size 3 --precision bf16_autocast --lr_scheduler cosine"
    lines = [f"{expanded(train_type)} --save_model" for train_type in TRAIN_TYPES]
    lines += [f"--optimizer {optimizer} --dataset {__file__} {more}" for optimizer in choices.OPTIMIZERS]
    assert {name for line in lines for name in settings(line)} == named


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--batch_size 4 --gradient_accumulation_steps 3", {"plan.micro_batch": 4, "train.rows_per_step": 24}),
        ("--world_size 8", {"plan.ranks": 8, "train.rows_per_step": 8}),
        ("--world_size 1", {"plan.ranks": 1, "train.rows_per_step": 1, "plan.strategy": "single"}),
        ("--use_cpu_offload false", {"plan.offload_base": False}),
        ("--use_activation_cpu_offload true", {"plan.offload_activations": True}),
        ("--use_activation_cpu_offload true --use_gradient_checkpointing false", {"plan.checkpointing": "none"}),
        ("--use_gradient_checkpointing false", {"plan.checkpointing": "none"}),
        ("--context_length 2048", {"data.context": 2048}),
        ("--num_epochs 3", {"train.epochs": 3.0}),
        ("--dataset orca_math --dataset_samples 10000", {"data.sets": ["orca_math"], "data.sets_limit": 10000}),
        ("--dataset dummy", {"data.sets": ["dummy"], "data.sets_limit": 512}),
        ("--sharding_strategy ddp", {"plan.strategy": "ddp", "plan.offload_base": False}),
        ("--sharding_strategy shard_grad_op", {"plan.strategy": "fsdp-grad", "plan.offload_base": False}),
        ("--sharding_strategy hybrid_full_shard", {"plan.strategy": "hybrid"}),
        ("--sharding_strategy hybrid_shard_grad_op", {"plan.strategy": "hybrid-grad", "plan.offload_base": False}),
        ("--precision fp32", {"model.dtype": "fp32"}),
        ("--precision fp16_autocast", {"model.dtype": "fp32", "model.autocast": "fp16"}),
        ("--precision bf16_autocast", {"model.dtype": "fp32", "model.autocast": "bf16"}),
        ("--precision bf16_buffers_autocast", {}),
        ("--lora_rank 8 --lora_alpha 32 --lora_dropout 0", {"adapt.rank": 8, "adapt.alpha": 32.0, "adapt.dropout": 0.0}),
        ("--lora_target_modules default", {"adapt.targets": ["q_proj", "v_proj"]}),
        ("--lr 2e-4", {"train.lr": 2e-4}),
        ("--apply_gradient_clipping true", {"train.clip": 0.3}),
        ("--apply_gradient_clipping true --grad_norm 1", {"train.clip": 1.0}),
        ("--grad_norm 1", {}),
        ("--wd 0.5", {"train.weight_decay": 0.5}),
        ("--lr_scheduler linear", {"train.schedule": "linear", "train.warmup": 0.1}),
        ("--lr_scheduler cosine", {"train.schedule": "cosine", "train.warmup": 0.1, "train.lr_floor": 0.1}),
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
    for precision, dtype in (("bf16", "bf16"), ("bf16_autocast", "fp32"), ("fp32", "fp32")):
        found = settings(f"{expanded(train_type)} --save_model true --precision {precision}")
        assert found["export.writers"] == [writer]
        assert found.get("export.dtype") == (dtype if writer == "transformers" else None)


def test_two_command_lines_that_save_nothing_have_two_folders_and_one_has_one():
    assert settings("--lr 1")["name"] == settings("--lr=1.0")["name"] != settings("--lr 2")["name"]


def test_on_a_cpu_there_is_one_process_and_nothing_to_offload_from():
    found = settings("--use_activation_cpu_offload true", gpus=1, on_gpu=False)
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
