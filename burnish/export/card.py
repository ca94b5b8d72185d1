"""The README.md of what is written: base, format, method, template, and how to read it back."""

from pathlib import Path
from typing import Any

from burnish.adapt.methods import METHODS
from burnish.adapt.methods import in_words as method_in_words
from burnish.config import ExportConfig
from burnish.export.distance import in_words
from burnish.export.tuned import Tuned
from burnish.load.pretrained import HUB_ID

BITSANDBYTES = {("nf4", 64): "nf4", ("fp4", 64): "fp4"}
"""(format, block) → bitsandbytes' quant type that makes the very bytes of the base that training saw."""

UNBLOCKED = ("none", "stored", "int8_row", "q4_0", "q4_1", "q8_0")
"""Formats that `model.block` says nothing of."""

ADAPTER_CODE = """```python
{imports}
base = AutoModelForCausalLM.from_pretrained({arguments})
model = PeftModel.from_pretrained(base, ".")  # this folder
tokenizer = AutoTokenizer.from_pretrained(".")
```"""

MERGED_CODE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")  # this folder
tokenizer = AutoTokenizer.from_pretrained(".")
```"""

GGUF_CODE = """```sh
llama-server -m model.gguf --lora adapter.gguf  # in this folder
```"""

GGUF_NOTE = """`model.gguf` is the base's own file: no weight was quantized again{folded}.
`adapter.gguf` holds what was trained beside it, already scaled: leave its scale at 1. Answers are those
that were measured but for the engine's own rounding: llama.cpp quantizes activations to 8 bits before it multiplies them with such blocks,
which moves log-probabilities more than anything here."""
_MERGED = "Merged in fp32 into the dequantized base (its weights as the format `{format_name}` held them)."
MADE = {
    "lora": _MERGED,
    "dora": _MERGED,
    "full": "The trained weights, and what was not trained as the base holds it.",
    "expand": "The blocks of the base as the format `{format_name}` held them (dequantized), and the new blocks as they were trained.",
}
"""How the weights of a merged folder came about, by method."""

SAME_VALUES = "So read, the base is the one that was trained on, and the answers are those that were measured, but for rounding."

ON_A_CPU = """On a GPU, that is. On CPUs with bf16 instructions bitsandbytes (0.50) repacks the weights at the first forward pass: it then
computes in bf16, and PEFT's DoRA misreads them and answers nonsense. On a CPU, use a folder of the writer `transformers`."""

OTHER_VALUES = """This opens the base as its own files hold it, not the dequantized base, which differs from it by the error of the format.
Its answers are therefore close to those that were measured, and not the same.{dora} For one folder of just the weights that were measured,
export with the writer `transformers`."""

DORA_NOTE = """ DoRA's magnitudes started as the row norms of the dequantized base; on other weights PEFT
divides by other norms, so even an untrained adapter would change the base a little."""


def adapter_card(tuned: Tuned) -> str:
    """The card of an adapter's folder. Its code runs as it stands, with that folder as the working directory."""
    method, format_name = METHODS[tuned.adapt.method].title, tuned.about["format"]
    source, gguf = _source(tuned.about["base"])
    if tuned.about.get("revision"):
        source += f', revision="{tuned.about["revision"]}"'
    imports = "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
    if "importlib" in source:
        imports = f"import importlib.util\n\n{imports}"
    ends = tuned.about.get("ends", "none")
    note = (
        SAME_VALUES
        if format_name in ("none", "stored") and ends in ("none", "stored")
        else OTHER_VALUES.format(dora=DORA_NOTE if tuned.adapt.method == "dora" else "")
    )
    quant_type = BITSANDBYTES.get((format_name, tuned.about["block"])) if ends == "none" else None
    if quant_type and not gguf:
        note = f"{SAME_VALUES} {ON_A_CPU}"
        compute = tuned.about["dtype"] if tuned.about.get("autocast", "none") == "none" else tuned.about["autocast"]
        compute = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}[compute]
        imports = imports.replace("AutoTokenizer\n", "AutoTokenizer, BitsAndBytesConfig\n")
        quantization = f'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="{quant_type}", bnb_4bit_compute_dtype="{compute}")'
        imports += f"\nquantization = {quantization}"
        source += ", quantization_config=quantization"
    elif (
        format_name == "stored"
        and ends in ("none", "stored")
        and not gguf
        and any(layer.format_name != "none" for layer in tuned.built.linears.values())
    ):
        note = f"{SAME_VALUES} {ON_A_CPU}"
    facts = _facts(tuned, f"Trained on the dequantized base: its weights as the format `{format_name}` holds them.")
    code = ADAPTER_CODE.format(imports=imports, arguments=f'{source}, dtype="auto"')
    return "\n\n".join([_head(tuned, "peft"), f"# {method} adapter", facts, "## Reading it with PEFT", code, note, _template(tuned)]) + "\n"


def merged_card(tuned: Tuned, config: ExportConfig, measured: dict[str, Any]) -> str:
    """The card of a merged folder, with what was measured between it and the live model."""
    facts = _facts(tuned, MADE[tuned.adapt.method].format(format_name=tuned.about["format"]))
    stored = f"Stored as {config.dtype}. After writing, it was read back: {in_words(measured)}."
    return "\n\n".join([_head(tuned, "transformers"), "# Finetuned model", facts, stored, MERGED_CODE, _template(tuned)]) + "\n"


def gguf_card(tuned: Tuned) -> str:
    """The card of the folder that llama.cpp serves."""
    folds = any(adapter.m is not None for adapter in tuned.built.adapters.by_name.values())
    facts = _facts(tuned, "Trained on the very blocks of the base's file.")
    note = GGUF_NOTE.format(folded=", and DoRA's gains are in the fp16 scales of its blocks, rounded as in training" if folds else "")
    template = _template(tuned, "in the metadata of `model.gguf`")
    return "\n\n".join([_head(tuned, "gguf"), "# Finetuned model for llama.cpp", facts, GGUF_CODE, note, template]) + "\n"


def _head(tuned: Tuned, library: str) -> str:
    """Front matter that the hub reads. A base that is not on the hub is named in the text alone."""
    asked = tuned.about["base"]
    base = f"base_model: {asked}\n" if HUB_ID.fullmatch(asked) and not Path(asked).exists() else ""
    return f"---\n{base}library_name: {library}\npipeline_tag: text-generation\ntags:\n- {tuned.adapt.method}\n---"


def _facts(tuned: Tuned, how: str) -> str:
    about = tuned.about
    revision = f", revision `{about['revision']}`" if about.get("revision") else ""
    ends, autocast = about.get("ends", "none"), about.get("autocast", "none")
    block = "" if {about["format"], ends} <= set(UNBLOCKED) else f", blocks of {about['block']} weights"
    held = "" if ends == "none" else f"; of embeddings and head: `{ends}`"
    computed = about["dtype"] if autocast == "none" else f"{about['dtype']}, products in {autocast}"
    return "\n".join(
        [
            f"- Base: `{about['base']}`{revision} (fingerprint `{about['fingerprint']}`)",
            f"- Format of the base in training: `{about['format']}`{held}{block}; computed in {computed}",
            f"- Method: {method_in_words(tuned.adapt)}",
            f"- {how}",
        ]
    )


TOKENIZER = "saved with the tokenizer: `tokenizer.apply_chat_template(messages, add_generation_prompt=True)`"


def _template(tuned: Tuned, where: str = TOKENIZER) -> str:
    system = tuned.template.system
    said = "Every conversation of the training began with no system message" if system is None else f"with the system message {system!r}"
    said = said if system is None else f"Every conversation of the training began {said}; it is not part of the template, so send it"
    return f"## Chat template\n\n`{tuned.template.name}`, {where}. {said}.\nTrained in contexts of {tuned.about['context']} tokens."


def _source(asked: str) -> tuple[str, bool]:
    """What to give `from_pretrained` for the base, as code, and whether it is a GGUF file."""
    package, _, file = asked.removeprefix("package:").partition("/")
    gguf = asked.endswith(".gguf")
    if asked.startswith("package:"):
        place = f'importlib.util.find_spec("{package}").submodule_search_locations[0]'
        return (f'{place}, gguf_file="{file}"', True) if gguf else (f'{place} + "/{file}"', False)
    return (f'{str(Path(asked).parent)!r}, gguf_file="{Path(asked).name}"', True) if gguf else (repr(asked), False)
