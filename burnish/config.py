"""What was asked: frozen sections read from one strict TOML file. What was decided: `Plan`."""

import tomllib
from dataclasses import asdict, field, fields
from datetime import date, time
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from burnish.errors import UserError, did_you_mean

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """The base model and how its weights are held."""

    path: str
    """A folder with safetensors, a .gguf file, `package:NAME/FILE` inside an installed Python package, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    format: Literal["none", "nf4"] = "nf4"
    """How the decoder's linear layers are stored: `none` keeps them in the compute dtype."""
    block: Literal[32, 64, 128, 256] = 64
    """Weights that share one scale. A block never crosses a row."""
    dtype: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """Compute dtype. `auto` is bf16 on a GPU that has it, fp32 elsewhere."""
    cache: bool = True
    """Keep the quantized weights on disk (`~/.cache/burnish` or BURNISH_CACHE) for the next start."""
    run_model_code: bool = False
    """Run Python code that lies in the model's folder. Read that code first."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MixtureSource:
    """One `[[data.mixture]]`: where rows come from, and how many of them an epoch has."""

    source: str
    """A file of rows, the name of a set, `name=path`, or `documents` for the extracted rows."""
    weight: Annotated[float, Field(ge=0)] | None = None
    """Share of an epoch's rows, against the other sources' weights. All sources have one or none; without, all rows are taken."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """At most so many passes over this source in an epoch."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """Documents and rows, and how they become token ids with a loss mask."""

    documents: tuple[str, ...] = ()
    """PDF, Markdown and text files, folders of them, or globs; relative to the config file."""
    rows: tuple[str, ...] = ()
    """Files of rows: JSON, JSONL, Parquet, or plain text (.txt, .md). Formats are in docs/data.md."""
    format: str = "auto"
    """Format of every file of rows: `auto` tells it by the keys of a file's first row; a name of `burnish.data.formats.FORMATS`."""
    rows_limit: Positive | None = None
    """Take only the first so many rows of each file of rows."""
    sets: tuple[str, ...] = ()
    """Named data sets (docs/sets.md), from the hub; `name=path` reads a local file or folder in its place."""
    sets_limit: Positive | None = None
    """Take only so many rows of each set: its first, or a draw by `seed` where the set says so."""
    mixture: tuple[MixtureSource, ...] = ()
    """Sources with weights and epochs, in the place of `rows` and `sets`: each weight gets exactly its share of an epoch's rows."""
    replay: tuple[str, ...] = ()
    """General rows against forgetting: files of rows, names of sets, or `name=path`. Some of them are only evaluated."""
    replay_share: Share = 0.0
    """Share of the rows of an epoch that are `replay`'s."""
    extract: Literal["none", "recall"] = "none"
    """Rows made from the documents' sections without a model: `recall` asks for a section by its heading."""
    extract_limit: Positive | None = None
    """Take only the first so many extracted rows."""
    questions: tuple[str, ...] = ()
    """Files of rows that are only evaluated: facts that were trained, worded differently (unseen wording)."""
    questions_limit: Positive | None = None
    """Take only the first so many questions of each file."""
    validation: tuple[str, ...] | Share = 0.0
    """Rows whose loss is watched during training: files of them, or a share of the rows drawn by `seed`, by whole sections and facts."""
    held_out_sections: tuple[str, ...] | Share = 0.0
    """Sections kept out of training (unseen section): parts of their headings, or a share drawn by `seed`."""
    template: str = "auto"
    """Chat template: `own` is the tokenizer's, or one of `TEMPLATES`. `auto`: that of the sets that are trained, or own, or `alpaca`."""
    system: str | None = None
    """System message of each conversation. None leaves it out, also where the template would put in one of its own."""
    turns: Positive = 1
    """Rows put into one conversation as turns of it."""
    context: Annotated[int, Field(ge=16)] = 1024
    """Tokens in one packed context."""
    too_long: Literal["refuse", "drop", "split"] = "refuse"
    """A row that is longer than the context: stop, leave it out and report it, or split its answer into several rows."""
    seed: int = 0
    """Shuffling, packing and the draw of held-out sections."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PlanConfig:
    """Pins of what the planner would choose by itself."""

    ranks: Count = 0
    """Processes. 0 takes one for each GPU, and one on a CPU."""
    strategy: Literal["auto", "single", "ddp", "fsdp"] = "auto"
    """`fsdp` shards every parameter over the ranks, `ddp` replicates them."""
    micro_batch: Count = 0
    """Packed contexts in one forward pass of one rank. 0 lets the plan choose."""
    checkpointing: Literal["auto", "layers", "none"] = "auto"
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    device_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory of one device in GB (10^9 bytes) to plan for, where it is not this machine's."""
    host_gb: Annotated[float, Field(gt=0)] | None = None
    """Host memory in GB to plan for, where it is not this machine's."""
    anyway: bool = False
    """Run although the plan says that it does not fit."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdaptConfig:
    """What is trained."""

    method: Literal["lora", "dora"] = "dora"
    """`lora`, or `dora`: LoRA with a trained magnitude for each output row."""
    rank: Positive = 16
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is scaled by alpha / rank."""
    dropout: Share = 0.0
    """Dropout on the input of the low-rank branch alone."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732)."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of linear layers of the decoder (`q_proj`), or `all-linear`."""
    seed: int = 0
    """First values of A. B starts at zero."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """How long, how fast, and what is kept."""

    rows_per_step: Positive = 8
    """Packed contexts in one optimizer step, over all ranks. The result does not depend on how the plan cuts it."""
    epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the rows. Not read where `steps` is given."""
    steps: Positive | None = None
    """Optimizer steps."""
    optimizer: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 2e-4
    """Highest learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """Steps over which the rate rises: a share of all steps below 1, a number of steps from 1 on."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Not applied to magnitudes, norms and biases."""
    beta1: Share = 0.9
    beta2: Share = 0.999
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradient. 0 does not clip."""
    seed: int = 0
    """Dropout."""
    validate_every: Count = 0
    """Steps between measurements of the loss on `data.validation`. 0 measures it after the last step alone."""
    checkpoint_every: Positive = 100
    """Steps between checkpoints. There is always one at the end, and one when the run is interrupted."""
    keep: Positive = 2
    """Newest checkpoints that are kept."""
    deterministic: bool = False
    """Deterministic kernels: exact resume on a GPU too."""
    log: tuple[Literal["rich", "stdout", "tensorboard"], ...] = ("rich", "tensorboard")
    """Where progress is shown, beside metrics.jsonl, which is always written."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateConfig:
    """Base against tuned on the same prompts."""

    new_tokens: Positive = 32
    """Longest generated answer."""
    metric: Literal["exact", "number"] = "exact"
    """When an answer is right: `exact` compares all its words, `number` the last number in it, as for sums that are worked out."""
    general: tuple[str, ...] = ()
    """General rows (files, sets, or `name=path`) on which the loss tells what was forgotten; else those of `data.replay` not trained."""
    general_limit: Positive = 200
    """Take only so many general rows, or contexts of plain text, of each."""
    batch: Positive = 16
    """Prompts generated at a time."""
    resamples: Annotated[int, Field(ge=100)] = 10_000
    """Bootstrap resamples for the 95 % intervals."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExportConfig:
    """What is written for others to read."""

    writers: tuple[Literal["peft", "transformers"], ...] = ("peft",)
    """`peft`: the adapter in PEFT's format. `transformers`: one merged folder of dense weights."""
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of the merged weights."""
    shard_gb: Annotated[float, Field(gt=0)] = 5.0
    """Largest safetensors file of the merged folder, in GB."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """One run: what is asked, whole."""

    name: str
    """The run's folder is `root/name`."""
    model: ModelConfig
    root: str = "runs"
    data: DataConfig = field(default_factory=DataConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Plan:
    """What was decided, so that every rank does the same. Written to `2-plan/plan.json`."""

    device: Literal["cpu", "cuda"]
    ranks: Positive
    strategy: Literal["single", "ddp", "fsdp"]
    dtype: Literal["fp32", "bf16", "fp64"]
    micro_batch: Positive
    """Packed contexts in one forward pass of one rank."""
    accumulation: Positive
    """Forward passes of one rank in one step."""
    checkpointing: bool


def canonical(section: Any) -> dict[str, Any]:
    """A section as plain JSON values, for a manifest's key."""
    return TypeAdapter(dict[str, Any]).dump_python(asdict(section), mode="json")


def load_config(path: str | Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """The run described by a TOML file, with `section.key=value` overrides put over it.

    Paths inside it that are relative and exist beside the file are resolved against the file's folder.
    Raises a `UserError` that lists every problem at once.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. A first one to copy is examples/ferry/demo.toml.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; a config is one TOML file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise UserError(f"{path} is not valid TOML: {problem}.") from None
    for override in overrides:
        _override(raw, override)
    return _resolved(parse_config(raw, path.name), path.parent)


def parse_config(raw: dict[str, Any], name: str = "config") -> RunConfig:
    """A checked `RunConfig` from plain values; `name` is what error messages call their source."""
    try:
        return TypeAdapter(RunConfig).validate_python(raw)
    except ValidationError as problems:
        lines = list(dict.fromkeys(_explain(dict(problem)) for problem in problems.errors()))
        raise UserError(f"{name}: {len(lines)} problem{'s' * (len(lines) > 1)}\n  " + "\n  ".join(lines)) from None


def _override(raw: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"{override!r} is not an override. Write section.key=value, for example train.lr=1e-4.")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = _bare(text)
    if isinstance(value, (date, time)):
        value = text.strip()  # name=2026-01-31: no setting is a date
    place = raw
    for key in keys[:-1]:
        place = place.setdefault(key, {})
        if not isinstance(place, dict):
            raise UserError(f"{dotted}: {key} is a setting, not a section.")
    place[keys[-1]] = value


def _bare(text: str) -> str | list[str]:
    """Words without quotes are strings, `[a, b]` a list of them, so that no shell needs two kinds of quotes."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return text
    return [word.strip().strip("'\"") for word in text[1:-1].split(",") if word.strip()]


def _explain(problem: dict[str, Any]) -> str:
    # pydantic puts the alternatives of a union among the keys ("tuple[str, ...]"); a setting's name is an identifier, an item's a number
    keys = [str(key) for key in problem["loc"] if str(key).isidentifier() or isinstance(key, int)]
    where = ".".join(keys)
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        owner = _section([key for key in keys[:-1] if not key.isdigit()])
        return f"{where}: no such setting.{did_you_mean(keys[-1], owner)}"
    if problem["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{where}: is missing."
    return f"{where} = {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}."


def _section(keys: list[str]) -> list[str]:
    owner: Any = RunConfig
    for key in keys:
        found = [entry.type for entry in fields(owner) if entry.name == key]
        inner = [kind for entry in found for kind in (entry, *getattr(entry, "__args__", ())) if hasattr(kind, "__dataclass_fields__")]
        if not inner:
            return []
        owner = inner[0]
    return [entry.name for entry in fields(owner)]


def _resolved(config: RunConfig, folder: Path) -> RunConfig:
    """Paths beside the config file, made absolute; what does not exist there is left to its reader to explain."""

    def beside(text: str) -> str:
        path = Path(text).expanduser()
        return str(path if path.is_absolute() else (folder / path).resolve())

    def model(text: str) -> str:
        return beside(text) if (folder / text).exists() else text

    def source(text: str) -> str:
        """A set's name, `name=path`, or a file: only a path has a point or a slash in it."""
        name, equals, path = text.partition("=")
        if equals and name.isidentifier():
            return f"{name}={beside(path)}"
        return text if text.isidentifier() and not (folder / text).exists() else beside(text)

    values = asdict(config)
    values["model"]["path"] = model(config.model.path)
    for key in ("documents", "rows", "questions"):
        values["data"][key] = tuple(beside(text) for text in values["data"][key])
    for section, key in (("data", "sets"), ("data", "replay"), ("evaluate", "general")):
        values[section][key] = tuple(source(text) for text in values[section][key])
    for part in values["data"]["mixture"]:
        part["source"] = source(part["source"])
    if isinstance(config.data.validation, tuple):
        values["data"]["validation"] = tuple(beside(text) for text in config.data.validation)
    return TypeAdapter(RunConfig).validate_python(values)
