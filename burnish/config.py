"""What was asked: frozen sections read from one strict TOML file. What was decided: `Plan`."""

from dataclasses import asdict, field, replace
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

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
    format: Literal["none", "nf4", "fp4", "int8", "int8_row", "int4", "hqq", "q4_0", "q4_1", "q8_0", "stored"] = "nf4"
    """How the decoder's linear layers are stored: `none` in the compute dtype; `stored` as the model's files hold them (docs/gguf.md)."""
    bits: Literal[1, 2, 3, 4, 8] = 4
    """Width of a weight in the format `hqq`; the others have theirs in their names."""
    block: Literal[32, 64, 128, 256] = 64
    """Weights that share one scale, where the format leaves it open. A block never crosses a row. `int4` and `hqq` have 32, 64 or 128."""
    double_quantized: bool = False
    """Hold the scales of `nf4` and `fp4` in 8 bits, by row (QLoRA, section 3)."""
    ends: Literal["none", "nf4", "fp4", "int8", "int4", "q4_0", "q4_1", "q8_0", "stored"] = "none"
    """How embeddings and head are stored, as `format` has it, in blocks of `block`: they are then frozen, and 2 to 7 times smaller."""
    dtype: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """Compute dtype. `auto` is bf16 on a GPU that has it, fp16 (with a scaled loss) on one that has not, fp32 on a CPU."""
    autocast: Literal["none", "bf16", "fp16"] = "none"
    """Compute products and attention in this dtype (`torch.autocast`) and keep all between them, and frozen weights that are not quantized,
    in fp32: docs/precision.md."""
    cache: bool = True
    """Keep the quantized weights on disk (`~/.cache/burnish` or BURNISH_CACHE) for the next start."""
    run_model_code: bool = False
    """Run Python code that lies in the model's folder. Read that code first."""

    def __post_init__(self) -> None:
        """Refuses settings that do not go together; `parse_config` puts `model.` before the message."""
        if self.bits != 4 and self.format != "hqq":
            raise ValueError(
                f"bits = {self.bits}: the format hqq alone has a choice of bits, and this is {self.format}. "
                "Leave it out, or set model.format=hqq."
            )
        if self.double_quantized and self.format not in ("nf4", "fp4"):
            raise ValueError(
                f"double_quantized = true: the scales of nf4 and fp4 alone can be quantized, and this is {self.format}. "
                "Leave it out, or set model.format=nf4."
            )
        if self.autocast != "none" and self.dtype not in ("auto", "fp32"):
            raise ValueError(
                f"autocast = {self.autocast!r}: it rounds fp32 to 16 bits in products, and dtype = {self.dtype!r}. Leave one of them out."
            )
        if self.block > 128 and self.ends == "int4":
            raise ValueError(f"block = {self.block}: ends = 'int4' has blocks of 32, 64 or 128 weights. Choose one of them.")
        if self.block > 128 and self.format in ("int4", "hqq"):
            raise ValueError(f"block = {self.block}: {self.format} has blocks of 32, 64 or 128 weights. Choose one of them.")

    @property
    def keeps_stored(self) -> bool:
        """Whether what is built depends on what the model's files hold."""
        return "stored" in (self.format, self.ends)

    @property
    def held_as(self) -> str:
        """The row of `burnish.model.formats.FORMATS` that these settings ask for: `nf4`, `nf4_double`, `hqq3`. See `settings_of`."""
        bits = str(self.bits) if self.format == "hqq" else ""
        return f"{self.format}{bits}{DOUBLE if self.double_quantized else ''}"


DOUBLE = "_double"


def settings_of(held_as: str) -> dict[str, Any]:
    """The settings of `[model]` that ask for a row of `FORMATS`."""
    name = held_as.removesuffix(DOUBLE)
    width = name.removeprefix("hqq")
    given = {"format": "hqq", "bits": int(width)} if width.isdigit() else {"format": name, "bits": 4}
    return given | {"double_quantized": name != held_as}


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
    processes: Positive = 1
    """Processes that tokenize conversations. What they write is the same; a second one pays from some 100,000 rows on."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PlanConfig:
    """Pins of what the planner would choose by itself."""

    ranks: Count = 0
    """Processes. 0 takes one for each GPU, and one on a CPU."""
    strategy: Literal["auto", "single", "ddp", "fsdp", "fsdp-grad", "hybrid", "hybrid-grad"] = "auto"
    """`ddp` replicates every parameter, `fsdp` shards it over the ranks and gathers it where it is used; `fsdp-grad` keeps it gathered from
    the forward to the backward pass; `hybrid` and `hybrid-grad` do the same inside groups of ranks, each of which holds a whole copy."""
    shard_ranks: Count = 0
    """Ranks in one group of `hybrid`. 0 takes those of one machine."""
    micro_batch: Count = 0
    """Packed contexts in one forward pass of one rank. 0 lets the plan choose."""
    checkpointing: Literal["auto", "layers", "none"] = "auto"
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    checkpoint_every: Count = 0
    """With checkpointing, recompute the first of every so many decoder layers; the others keep their activations. 0 lets the plan choose
    where `checkpointing` is `auto`, and is each of them with `layers`."""
    offload_activations: bool | None = None
    """Keep what checkpointing keeps, the input of each recomputed layer, in host memory instead of on the GPU. Left out: the plan says."""
    offload_base: bool | None = None
    """Keep the frozen base in host memory while training and bring its decoder layers to the GPU one ahead of their use:
    docs/precision.md. With `fsdp` and `hybrid` each rank keeps its own rows; not with `ddp`, `fsdp-grad` and `hybrid-grad`. Left out, the
    plan chooses."""
    device_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory of one device in GB (10^9 bytes) to plan for, where it is not this machine's."""
    host_gb: Annotated[float, Field(gt=0)] | None = None
    """Host memory in GB to plan for, where it is not this machine's."""
    anyway: bool = False
    """Run although the plan says that it does not fit."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdaptConfig:
    """What is trained."""

    method: Literal["lora", "dora", "full", "expand"] = "dora"
    """`lora`, `dora` (LoRA with trained magnitudes), `full` (the weights themselves), `expand` (new decoder blocks): docs/methods.md."""
    rank: Positive = 16
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is scaled by alpha / rank."""
    dropout: Share = 0.0
    """Dropout on the input of the low-rank branch alone."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732)."""
    targets: tuple[str, ...] = ("all",)
    """What gets adapters, or what `full` trains: `q_proj`, `layers.1?.self_attn.*`, `re:REGEX` of whole names, `all-linear`, `all`."""
    also: tuple[str, ...] = ()
    """Modules that are trained in full beside adapters, named as targets are: `embed_tokens`, `lm_head`, `norm`."""
    new_blocks: int = 0
    """`expand`: decoder blocks to add, spread evenly; at most as many as the model has."""
    seed: int = 0
    """First values of A. B starts at zero."""
    start: Literal["uniform", "normal"] = "uniform"
    """How A begins: `uniform` within 1 / √in, as PEFT's, or `normal` with deviation 1 / √rank, which is √(3 in / rank) times as wide."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """How long, how fast, and what is kept."""

    rows_per_step: Positive = 8
    """Packed contexts in one optimizer step, over all ranks. The result does not depend on how the plan cuts it."""
    epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the rows. Not read where `steps` is given."""
    steps: Positive | None = None
    """Optimizer steps."""
    optimizer: Literal["adamw", "adam", "sgd", "adadelta", "adamw8bit", "paged_adamw", "paged_adamw8bit"] = "adamw"
    """`adamw8bit` keeps its moments in 8 bits, the `paged_` ones in memory that moves to the host when a GPU runs out of its own."""
    lr: Annotated[float, Field(gt=0)] = 2e-4
    """Highest learning rate. `adadelta` wants one near 1."""
    lr_b: Annotated[float, Field(gt=0)] | None = None
    """Highest rate of B alone; some 16 times `lr` is LoRA+ (arXiv 2402.12354). None is `lr`."""
    lr_magnitude: Annotated[float, Field(gt=0)] | None = None
    """Highest rate of the magnitudes of DoRA alone. None is `lr`."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    lr_floor: Share = 0.0
    """Share of the highest rate at which `linear` and `cosine` end."""
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """Steps over which the rate rises: a share of all steps below 1, a number of steps from 1 on."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Not applied to magnitudes, norms and biases."""
    beta1: Share = 0.9
    beta2: Share = 0.999
    """`beta1` and `beta2` are those of the Adam kinds."""
    momentum: Share = 0.9
    """Of `sgd`. 0 keeps no moment at all."""
    rho: Share = 0.9
    """Of `adadelta`: how long squares of gradients and of updates are remembered."""
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
    log: tuple[Literal["rich", "stdout", "tqdm", "tensorboard", "wandb", "none"], ...] = ("rich", "tensorboard")
    """Where progress is shown, beside metrics.jsonl, which is always written. `wandb` needs `pip install burnish[wandb]`."""
    wandb_project: str = "burnish"
    """Project of Weights & Biases; the run is called as this run is. WANDB_MODE=offline sends nothing."""
    profile: tuple[Count, Count, Positive] | None = None
    """[wait, warm-up, record]: so many steps of each, then a trace of the recorded ones in `3-train/profile`."""
    memory_snapshot: bool = False
    """What was allocated on the GPU when, and by which line, over the whole training: `3-train/memory/snapshot.pickle`."""


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

    writers: tuple[Literal["peft", "transformers", "gguf"], ...] | None = None
    """`peft`: the adapter in PEFT's format. `transformers`: one merged folder of dense weights. `gguf`: for llama.cpp (docs/gguf.md). None
    is `peft` where adapters are trained, else `transformers`."""
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
    strategy: Literal["single", "ddp", "fsdp", "fsdp-grad", "hybrid", "hybrid-grad"]
    shard_ranks: Count = 0
    """Ranks that share one copy under `hybrid`."""
    dtype: Literal["fp32", "bf16", "fp16", "fp64"]
    micro_batch: Positive
    """Packed contexts in one forward pass of one rank."""
    accumulation: Positive
    """Forward passes of one rank in one step."""
    checkpointing: bool
    checkpoint_every: Positive = 1
    """With checkpointing, the first of every so many decoder layers is recomputed."""
    offload_activations: bool = False
    offload_base: bool = False
    offload_base_after: bool = False
    """As `offload_base`, in the one process that evaluates, exports and serves what was trained."""
    evaluate_batch: Count = 0
    """Prompts that it generates at a time, where `evaluate.batch` are too many. 0 is as that says."""

    @property
    def alone(self) -> "Plan":
        """Of that one process, which has the whole model."""
        one = replace(self, ranks=1, strategy="single", shard_ranks=0, accumulation=1, offload_base=self.offload_base_after)
        return replace(one, checkpointing=False, checkpoint_every=1, offload_activations=False)

    @property
    def sharded(self) -> bool:
        return self.strategy not in ("single", "ddp")

    @property
    def shards(self) -> int:
        """Ranks that one copy of the model is cut over: 1 for one device and for replicas."""
        if not self.sharded:
            return 1
        return self.shard_ranks if self.hybrid else self.ranks

    @property
    def hybrid(self) -> bool:
        return self.strategy.startswith("hybrid")

    @property
    def stays_gathered(self) -> bool:
        """From the forward to the backward pass."""
        return self.strategy.endswith("-grad")


def canonical(section: Any) -> dict[str, Any]:
    """A section as plain JSON values, for a manifest's key."""
    return TypeAdapter(dict[str, Any]).dump_python(asdict(section), mode="json")
