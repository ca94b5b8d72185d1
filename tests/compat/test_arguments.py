"""The original's command lines are read as it read them."""

import pytest

from burnish.compat.arguments import ARGUMENTS, parse
from burnish.errors import UserError

DEFAULTS = {
    "world_size": -1,
    "train_type": "qlora",
    "llama_pro_path": None,
    "batch_size": 1,
    "context_length": 512,
    "gradient_accumulation_steps": 1,
    "num_epochs": 1,
    "dataset": "alpaca_sample",
    "dataset_samples": 512,
    "sharding_strategy": "full_shard",
    "use_gradient_checkpointing": True,
    "reentrant_checkpointing": False,
    "use_cpu_offload": True,
    "use_activation_cpu_offload": False,
    "low_memory": True,
    "no_sync": False,
    "precision": "bf16",
    "model_name": "meta-llama/Llama-2-7b-hf",
    "save_model": False,
    "output_dir": "output",
    "lora_rank": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "lora_target_modules": "all",
    "verbose": False,
    "lr": 1e-5,
    "apply_gradient_clipping": False,
    "grad_norm": 0.3,
    "wd": 0.1,
    "profile_memory": False,
    "optimizer": "adamw",
    "lr_scheduler": "constant",
    "loading_workers": -1,
    "log_to": "tqdm",
    "master_addr": "localhost",
    "master_port": "12355",
    "seed": 42,
    "project_name": "fsdp_qlora",
    "name": None,
    "group": None,
    "entity": None,
    "n_bits": 4,
    "profile": False,
    "profiling_output": "profiles",
    "with_stack": False,
    "with_shapes": False,
    "export_trace": True,
    "export_memory_timeline": False,
    "wait_steps": 0,
    "warmup_steps": 1,
    "active_steps": 2,
    "repeat": 0,
    "profiling_frequency": 10,
    "max_steps": -1,
}
"""Of the original's main branch."""


def values(line: str) -> dict:
    return vars(parse(line.split()).values)


def problems(*words: str) -> list[str]:
    with pytest.raises(UserError) as refused:
        parse(words)
    first, *lines = str(refused.value).splitlines()
    assert first == f"{len(lines)} problem{'s' * (len(lines) > 1)} with the arguments"
    return [line.strip() for line in lines]


def test_there_are_the_originals_54_with_its_defaults():
    assert len(ARGUMENTS) == 54
    assert values("") == DEFAULTS
    assert list(ARGUMENTS) == list(DEFAULTS)
    assert parse([]).given == frozenset()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_default_is_of_its_arguments_kind(name):
    argument = ARGUMENTS[name]
    assert argument.default is None or type(argument.default) is argument.kind
    assert not argument.choices or argument.default in argument.choices


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--batch_size 2", {"batch_size": 2}),
        ("--batch_size=2", {"batch_size": 2}),
        ("--batch-size 2", {"batch_size": 2}),
        ("--batch 2", {"batch_size": 2}),
        ("--batch_size 2 --batch_size 3", {"batch_size": 3}),
        ("--world_size -1", {"world_size": -1}),
        ("--lr 2e-4", {"lr": 2e-4}),
        ("--lr=1", {"lr": 1.0}),
        ("--lr_s cosine", {"lr_scheduler": "cosine"}),
        ("--profile true", {"profile": True}),
        ("--name first=one", {"name": "first=one"}),
        ("--name=first=one", {"name": "first=one"}),
        ("--output_dir=", {"output_dir": ""}),
        ("--save_model", {"save_model": True}),
        ("--save_model --lr 1", {"save_model": True, "lr": 1.0}),
        ("--use_cpu_offload False", {"use_cpu_offload": False}),
        ("--use_cpu_offload=no", {"use_cpu_offload": False}),
        ("--use_cpu_offload 0", {"use_cpu_offload": False}),
        ("--verbose TRUE", {"verbose": True}),
        ("--verbose y", {"verbose": True}),
        ("--master_port 12356", {"master_port": "12356"}),
    ],
)
def test_a_form_is_read(line, expected):
    assert values(line) == DEFAULTS | expected
    assert parse(line.split()).given == set(expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--batchsize", "2"), "--batchsize: no such argument. Did you mean batch_size?"),
        (("--use_ddp", "true"), "--use_ddp: no such argument. "),
        (("--lora", "3"), "--lora: may mean --lora_rank, --lora_alpha, --lora_dropout, --lora_target_modules. Write it out."),
        (("--batch_size", "two"), "--batch_size two: a whole number is expected"),
        (("--batch_size", "2.5"), "--batch_size 2.5: a whole number is expected"),
        (("--lr", "fast"), "--lr fast: a number is expected"),
        (("--lr",), "--lr: its value is missing (a number)"),
        (("--lr", "--wd", "0.1"), "--lr: its value is missing (a number)"),
        (("--save_model", "maybe"), "--save_model maybe: true or false is expected"),
        (("--train_type", "qdora"), "--train_type qdora: no such choice. Did you mean qlora?"),
        (("--precision", "mp_bf16_autocast"), "--precision mp_bf16_autocast: no such choice. Did you mean bf16_autocast?"),
        (("train",), "'train': belongs to no argument. Each begins with two hyphens: --batch_size 2"),
        (("--lr", "1", "-x"), "'-x': belongs to no argument."),
        (("--lr", "1", " "), "' ': in a shell, the backslash that continues a line must be its last character"),
        (("--world_size", "2", " #", "optional"), "' #': in a shell, the backslash"),
    ],
)
def test_what_cannot_be_read_is_told_with_the_way_out(words, message):
    (found,) = problems(*words)
    assert found.startswith(message)


def test_every_problem_of_a_line_is_told_at_once():
    assert problems("--batch_size", "x", "--lr", "y", "--nothing_like_it", "1", "--save_model", "perhaps") == [
        "--batch_size x: a whole number is expected",
        "--lr y: a number is expected",
        f"--nothing_like_it: no such argument. Known: {', '.join(sorted(ARGUMENTS))}.",
        "--save_model perhaps: true or false is expected",
    ]
