"""Finding the base model: a folder, a .gguf file, a file of an installed package, or a hub id; its configuration and tokenizer."""

import hashlib
import json
import re
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, TOKENIZER_MAPPING, AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from burnish.config import ModelConfig
from burnish.errors import UserError, did_you_mean
from burnish.load.quantized import check_quantized

HUB_ID = re.compile(r"[\w][\w.-]*/[\w.-]+")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
OWN_CODE = "If you have read that code and trust it, set `model.run_model_code=true`"
NO_PICKLES = (
    "Those are pickled files, which run code when they are opened, so burnish does not read them. Look for a safetensors version of the "
    "model, or convert it where you trust it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
)


@dataclass(frozen=True)
class Pretrained:
    """A base model that was found. `asked` is `model.path` as written; `gguf` is None for a folder with safetensors."""

    asked: str
    folder: Path
    gguf: Path | None
    config: transformers.PretrainedConfig
    run_model_code: bool
    quantized: dict[str, Any] | None = None
    """What config.json says of weights that are quantized already (its `quantization_config`)."""


def find_model(model: ModelConfig, weights: bool = True) -> Pretrained:
    """Finds the model that `model.path` names and reads its configuration; a hub id is downloaded if need be.

    With `weights=False` only the configuration is fetched, and need be there: enough to plan. Reads no weights and runs no code
    of the model's unless `model.run_model_code`. Raises a `UserError` for whatever is missing, unknown, or not safe to open.
    """
    path = _locate(model, weights)
    if path.is_file():
        return Pretrained(model.path, path.parent, path, _gguf_config(path), model.run_model_code)
    _check_folder(path, weights)
    config = _folder_config(path, model.run_model_code)
    quantized = config.__dict__.pop("quantization_config", None)  # or transformers would act on it, and an export repeat it
    return Pretrained(model.path, path, None, config, model.run_model_code, quantized)


def read_tokenizer(pretrained: Pretrained) -> PreTrainedTokenizerFast:
    """The model's tokenizer, backed by the `tokenizers` library. Raises a `UserError` where it is missing or cannot be read."""
    place = pretrained.folder if pretrained.gguf is None else pretrained.gguf
    if pretrained.gguf is None and not any((pretrained.folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"{place} holds no tokenizer ({', '.join(TOKENIZER_FILES[:3])} …). Copy the original model's tokenizer files into it."
        )
    try:
        tokenizer = _tokenizer(pretrained)
    except (ValueError, OSError, KeyError, TypeError, ImportError) as problem:
        if "trust_remote_code" in str(problem):
            raise UserError(f"{place}: the tokenizer needs Python code that lies in the folder. {OWN_CODE}.") from None
        raise UserError(f"{place}: the tokenizer cannot be read: {in_a_line(problem)}. Copy or download its files again.") from problem
    except Exception as problem:  # the tokenizers library raises bare Exception for a damaged tokenizer.json
        if type(problem) is not Exception:
            raise
        raise UserError(f"{place}: the tokenizer is damaged: {in_a_line(problem)}. Copy or download its files again.") from problem
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"{place}: its tokenizer ({type(tokenizer).__name__}) has no fast version, which burnish needs. Add a tokenizer.json to it."
        )
    return tokenizer


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """16 hexadecimal digits: equal for tokenizers that encode, mark and format text alike, wherever they were read from."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # a call with padding=True leaves these two changed behind it
    backend.pop("truncation", None)
    backend.pop("padding", None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    content = json.dumps([backend, special, tokenizer.chat_template], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]


# --- where it lies


def _locate(model: ModelConfig, weights: bool) -> Path:
    """The folder or GGUF file; downloads a hub id."""
    asked = model.path
    path = _in_package(asked) if asked.startswith("package:") else Path(asked).expanduser()
    if path.exists():
        if model.revision is not None:
            raise UserError(f"model.revision = {model.revision!r}, but {asked} is not a hub id: only those have revisions. Leave it out.")
        if path.is_file() and path.suffix != ".gguf":
            raise UserError(
                f"{path} is a file, but not a .gguf file. Give the folder that holds config.json and the weights: model.path={path.parent}."
            )
        return path
    if asked.startswith("package:") or not HUB_ID.fullmatch(asked):
        raise UserError(f"{path}: there is no such folder or file, and it is no hub id (owner/name). Check model.path.{_beside(path)}")
    from burnish.load.hub import fetch

    return fetch(asked, model.revision, weights, model.run_model_code)


def _in_package(asked: str) -> Path:
    """The file that `package:NAME/FILE` names, without importing the package."""
    package, _, file = asked.removeprefix("package:").partition("/")
    if not package.isidentifier():
        raise UserError(f"{asked!r}: write package:NAME/FILE with the name that Python imports (underscores, not hyphens).")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        install = f"pip install {package.replace('_', '-')}"
        raise UserError(f"{asked}: no Python package {package} is installed here. Install it ({install}), or give another model.path.")
    return Path(next(iter(spec.submodule_search_locations))) / file


def _beside(path: Path) -> str:
    """A name in the same folder that comes close."""
    if not path.parent.is_dir() or path.parent == Path():
        return ""
    names = [file.name for file in path.parent.iterdir() if file.is_dir() or file.suffix == ".gguf"]
    return "".join(f" Did you mean {close}?" for close in get_close_matches(path.name, sorted(names), n=1))


# --- a folder


def _check_folder(folder: Path, weights: bool) -> None:
    """What the folder must hold; also told before a plan: pickled weights never become readable."""
    files = sorted(file.name for file in folder.iterdir() if file.is_file())
    ggufs = [name for name in files if name.endswith(".gguf")]
    if "config.json" not in files:
        if ggufs:
            raise UserError(f"{folder} holds no config.json, but GGUF files. Name one of them: model.path={folder / ggufs[0]}.")
        if "adapter_config.json" in files:
            raise UserError(f"{folder} holds an adapter, not a model. Give the base that it was trained on.")
        raise UserError(f"{folder} holds no config.json, so it is not a model's folder. Is the download complete?")
    safetensors = [name for name in files if name.endswith(".safetensors")]
    pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern) if file.name != "training_args.bin")
    if pickled and not safetensors and not (folder / "model.safetensors.index.json").is_file():
        raise UserError(f"{folder} holds its weights only as {pickled[0]}. {NO_PICKLES}.")
    if weights and not safetensors and not (folder / "model.safetensors.index.json").is_file():
        raise UserError(f"{folder} holds a config.json but no weights (*.safetensors). Is the download complete?")


def _folder_config(folder: Path, run_model_code: bool) -> transformers.PretrainedConfig:
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise UserError(f"{path} is not valid JSON ({problem}). Copy or download it again.") from None
    _check_config(path, raw, run_model_code)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=run_model_code, local_files_only=True)
    except (ValueError, KeyError, TypeError, OSError, ImportError, AttributeError, StrictDataclassError) as problem:
        raise UserError(f"{path} cannot be read: {in_a_line(problem)}. Copy or download it again.") from problem
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not (run_model_code and "auto_map" in raw):
        raise UserError(
            f"{path}: a model of type {raw['model_type']!r} is not one that continues text. burnish trains decoder-only language models."
        )
    return config


def _check_config(path: Path, raw: Any, run_model_code: bool) -> None:
    """Reads config.json as plain JSON first: nothing of the folder may run to find out that it would."""
    if not isinstance(raw, dict) or not raw.get("model_type"):
        raise UserError(
            f"{path} names no model_type. "
            "It is not a transformers model's configuration, or one from before they had types: save the model anew with transformers."
        )
    known, own_code = raw["model_type"] in CONFIG_MAPPING, "auto_map" in raw
    if not known and own_code and not run_model_code:
        raise UserError(
            f"{path}: transformers {transformers.__version__} does not know the model type {raw['model_type']!r}; "
            f"the model brings Python code of its own, which would run with all your rights. {OWN_CODE}."
        )
    if not known and not own_code:
        close = did_you_mean(raw["model_type"], sorted(CONFIG_MAPPING)) if len(raw["model_type"]) > 3 else ""
        raise UserError(
            f"{path}: transformers {transformers.__version__} does not know the model type {raw['model_type']!r}. "
            f"A newer one may: pip install -U transformers.{close if close.startswith(' Did') else ''}"
        )
    quantized = raw.get("quantization_config")
    if quantized:
        check_quantized(path, quantized)


# --- GGUF and tokenizer


def _gguf_config(path: Path) -> transformers.PretrainedConfig:
    from burnish.load.gguf_header import read_gguf_header
    from burnish.load.gguf_model import gguf_config

    return gguf_config(read_gguf_header(path))


def _tokenizer(pretrained: Pretrained) -> Any:
    if pretrained.gguf is not None:
        # what AutoTokenizer ends at, without its parsing the whole file for a configuration first (3 s)
        kind: Any = TOKENIZER_MAPPING.get(type(pretrained.config), PreTrainedTokenizerFast)
        return kind.from_pretrained(pretrained.folder, gguf_file=pretrained.gguf.name)
    return AutoTokenizer.from_pretrained(pretrained.folder, trust_remote_code=pretrained.run_model_code)


def in_a_line(problem: BaseException) -> str:
    """Libraries explain over many lines; the first words say what is wrong."""
    text = " ".join(str(problem).split()) or type(problem).__name__
    return (text if len(text) <= 200 else f"{text[:200]} …").rstrip(".")
