"""Published models that are planned without a download: their configs' numbers, as the config.json of the hub id beside them states them.

A trained model reads its own config.json. A test counts the parameters of each row and holds them against the hub's.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from burnish.config import ModelConfig
from burnish.errors import UserError, did_you_mean
from burnish.load.pretrained import Pretrained, find_model


@dataclass(frozen=True)
class Shape:
    """One row. `hub` is the id whose config.json has these numbers; fine-tuned siblings of its owner (`-Instruct`, `-it`) share them."""

    hub: str
    family: str
    """The `model_type` of transformers."""
    weights: int
    """Parameters, a tied matrix once, as safetensors on the hub count them (to three digits on the model's page)."""
    numbers: dict[str, Any]

    def config(self) -> PretrainedConfig:
        return AutoConfig.for_model(self.family, **self.numbers)


def _decoder(layers: int, hidden: int, inner: int, heads: int, kv: int, vocab: int, longest: int, **others: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": longest,
    } | others


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
LLAMA2, LLAMA3 = _rope(1e4) | UNTIED, _rope(5e5) | UNTIED
QWEN, QWEN_TIED = _rope(1e6) | UNTIED, _rope(1e6) | TIED
QWEN3, QWEN3_TIED = {"head_dim": 128} | QWEN, {"head_dim": 128} | QWEN_TIED
LONG, LONGER = 32768, 131072

SHAPES: dict[str, Shape] = {
    "llama-2-7b": Shape("meta-llama/Llama-2-7b-hf", "llama", 6_738_415_616, _decoder(32, 4096, 11008, 32, 32, 32000, 4096, **LLAMA2)),
    "llama-2-13b": Shape("meta-llama/Llama-2-13b-hf", "llama", 13_015_864_320, _decoder(40, 5120, 13824, 40, 40, 32000, 4096, **LLAMA2)),
    "llama-2-70b": Shape("meta-llama/Llama-2-70b-hf", "llama", 68_976_648_192, _decoder(80, 8192, 28672, 64, 8, 32000, 4096, **LLAMA2)),
    "llama-3-8b": Shape("meta-llama/Meta-Llama-3-8B", "llama", 8_030_261_248, _decoder(32, 4096, 14336, 32, 8, 128256, 8192, **LLAMA3)),
    "llama-3-70b": Shape("meta-llama/Meta-Llama-3-70B", "llama", 70_553_706_496, _decoder(80, 8192, 28672, 64, 8, 128256, 8192, **LLAMA3)),
    "llama-3.1-8b": Shape("meta-llama/Llama-3.1-8B", "llama", 8_030_261_248, _decoder(32, 4096, 14336, 32, 8, 128256, LONGER, **LLAMA3)),
    "llama-3.1-70b": Shape("meta-llama/Llama-3.1-70B", "llama", 70_553_706_496, _decoder(80, 8192, 28672, 64, 8, 128256, LONGER, **LLAMA3)),
    "llama-3.1-405b": Shape(
        "meta-llama/Llama-3.1-405B", "llama", 405_853_388_800, _decoder(126, 16384, 53248, 128, 8, 128256, LONGER, **LLAMA3)
    ),
    "llama-3.2-1b": Shape(
        "meta-llama/Llama-3.2-1B",
        "llama",
        1_235_814_400,
        _decoder(16, 2048, 8192, 32, 8, 128256, LONGER, head_dim=64, **_rope(5e5), **TIED),
    ),
    "llama-3.2-3b": Shape(
        "meta-llama/Llama-3.2-3B",
        "llama",
        3_212_749_824,
        _decoder(28, 3072, 8192, 24, 8, 128256, LONGER, head_dim=128, **_rope(5e5), **TIED),
    ),
    "llama-3.3-70b": Shape(
        "meta-llama/Llama-3.3-70B-Instruct", "llama", 70_553_706_496, _decoder(80, 8192, 28672, 64, 8, 128256, LONGER, **LLAMA3)
    ),
    "mistral-7b-v0.1": Shape(
        "mistralai/Mistral-7B-v0.1",
        "mistral",
        7_241_732_096,
        _decoder(32, 4096, 14336, 32, 8, 32000, LONG, sliding_window=4096, **_rope(1e4), **UNTIED),
    ),
    "mistral-7b-v0.3": Shape(
        "mistralai/Mistral-7B-v0.3",
        "mistral",
        7_248_023_552,
        _decoder(32, 4096, 14336, 32, 8, 32768, LONG, sliding_window=None, **_rope(1e6), **UNTIED),
    ),
    "mistral-nemo-2407": Shape(
        "mistralai/Mistral-Nemo-Base-2407",
        "mistral",
        12_247_782_400,
        _decoder(40, 5120, 14336, 32, 8, 131072, LONGER, head_dim=128, sliding_window=None, **_rope(1e6), **UNTIED),
    ),
    "mistral-small-24b-2501": Shape(
        "mistralai/Mistral-Small-24B-Base-2501",
        "mistral",
        23_572_403_200,
        _decoder(40, 5120, 32768, 32, 8, 131072, LONG, head_dim=128, sliding_window=None, **_rope(1e8), **UNTIED),
    ),
    "qwen2-0.5b": Shape("Qwen/Qwen2-0.5B", "qwen2", 494_032_768, _decoder(24, 896, 4864, 14, 2, 151936, LONGER, **QWEN_TIED)),
    "qwen2-1.5b": Shape("Qwen/Qwen2-1.5B", "qwen2", 1_543_714_304, _decoder(28, 1536, 8960, 12, 2, 151936, LONGER, **QWEN_TIED)),
    "qwen2-7b": Shape("Qwen/Qwen2-7B", "qwen2", 7_615_616_512, _decoder(28, 3584, 18944, 28, 4, 152064, LONGER, **QWEN)),
    "qwen2-72b": Shape("Qwen/Qwen2-72B", "qwen2", 72_706_203_648, _decoder(80, 8192, 29568, 64, 8, 152064, LONGER, **QWEN)),
    "qwen2.5-0.5b": Shape("Qwen/Qwen2.5-0.5B", "qwen2", 494_032_768, _decoder(24, 896, 4864, 14, 2, 151936, LONG, **QWEN_TIED)),
    "qwen2.5-1.5b": Shape("Qwen/Qwen2.5-1.5B", "qwen2", 1_543_714_304, _decoder(28, 1536, 8960, 12, 2, 151936, LONGER, **QWEN_TIED)),
    "qwen2.5-3b": Shape("Qwen/Qwen2.5-3B", "qwen2", 3_085_938_688, _decoder(36, 2048, 11008, 16, 2, 151936, LONG, **QWEN_TIED)),
    "qwen2.5-7b": Shape("Qwen/Qwen2.5-7B", "qwen2", 7_615_616_512, _decoder(28, 3584, 18944, 28, 4, 152064, LONGER, **QWEN)),
    "qwen2.5-14b": Shape("Qwen/Qwen2.5-14B", "qwen2", 14_770_033_664, _decoder(48, 5120, 13824, 40, 8, 152064, LONGER, **QWEN)),
    "qwen2.5-32b": Shape("Qwen/Qwen2.5-32B", "qwen2", 32_763_876_352, _decoder(64, 5120, 27648, 40, 8, 152064, LONGER, **QWEN)),
    "qwen2.5-72b": Shape("Qwen/Qwen2.5-72B", "qwen2", 72_706_203_648, _decoder(80, 8192, 29568, 64, 8, 152064, LONGER, **QWEN)),
    "qwen3-0.6b": Shape("Qwen/Qwen3-0.6B", "qwen3", 596_049_920, _decoder(28, 1024, 3072, 16, 8, 151936, 40960, **QWEN3_TIED)),
    "qwen3-1.7b": Shape("Qwen/Qwen3-1.7B", "qwen3", 1_720_574_976, _decoder(28, 2048, 6144, 16, 8, 151936, 40960, **QWEN3_TIED)),
    "qwen3-4b": Shape("Qwen/Qwen3-4B", "qwen3", 4_022_468_096, _decoder(36, 2560, 9728, 32, 8, 151936, 40960, **QWEN3_TIED)),
    "qwen3-8b": Shape("Qwen/Qwen3-8B", "qwen3", 8_190_735_360, _decoder(36, 4096, 12288, 32, 8, 151936, 40960, **QWEN3)),
    "qwen3-14b": Shape("Qwen/Qwen3-14B", "qwen3", 14_768_307_200, _decoder(40, 5120, 17408, 40, 8, 151936, 40960, **QWEN3)),
    "qwen3-32b": Shape("Qwen/Qwen3-32B", "qwen3", 32_762_123_264, _decoder(64, 5120, 25600, 64, 8, 151936, 40960, **QWEN3)),
    "gemma-2-2b": Shape(
        "google/gemma-2-2b", "gemma2", 2_614_341_888, _decoder(26, 2304, 9216, 8, 4, 256000, 8192, head_dim=256, sliding_window=4096)
    ),
    "gemma-2-9b": Shape(
        "google/gemma-2-9b", "gemma2", 9_241_705_984, _decoder(42, 3584, 14336, 16, 8, 256000, 8192, head_dim=256, sliding_window=4096)
    ),
    "gemma-2-27b": Shape(
        "google/gemma-2-27b",
        "gemma2",
        27_227_128_320,
        _decoder(46, 4608, 36864, 32, 16, 256000, 8192, head_dim=128, query_pre_attn_scalar=144, sliding_window=4096),
    ),
    "gemma-3-270m": Shape(
        "google/gemma-3-270m", "gemma3_text", 268_098_176, _decoder(18, 640, 2048, 4, 1, 262144, LONG, head_dim=256, sliding_window=512)
    ),
    "gemma-3-1b": Shape(
        "google/gemma-3-1b-pt", "gemma3_text", 999_885_952, _decoder(26, 1152, 6912, 4, 1, 262144, LONG, head_dim=256, sliding_window=512)
    ),
    "phi-2": Shape(
        "microsoft/phi-2", "phi", 2_779_683_840, _decoder(32, 2560, 10240, 32, 32, 51200, 2048, partial_rotary_factor=0.4, **UNTIED)
    ),
    "phi-3-mini-4k": Shape(
        "microsoft/Phi-3-mini-4k-instruct",
        "phi3",
        3_821_079_552,
        _decoder(32, 3072, 8192, 32, 32, 32064, 4096, sliding_window=2047, **_rope(1e4), **UNTIED),
    ),
    "phi-3-medium-4k": Shape(
        "microsoft/Phi-3-medium-4k-instruct",
        "phi3",
        13_960_238_080,
        _decoder(40, 5120, 17920, 40, 10, 32064, 4096, sliding_window=2047, **_rope(1e4), **UNTIED),
    ),
    "phi-4": Shape("microsoft/phi-4", "phi3", 14_659_507_200, _decoder(40, 5120, 17920, 40, 10, 100352, 16384, **_rope(2.5e5), **UNTIED)),
    "yi-6b": Shape("01-ai/Yi-6B", "llama", 6_061_035_520, _decoder(32, 4096, 11008, 32, 4, 64000, 4096, **_rope(5e6), **UNTIED)),
    "yi-9b": Shape("01-ai/Yi-9B", "llama", 8_829_407_232, _decoder(48, 4096, 11008, 32, 4, 64000, 4096, **_rope(1e4), **UNTIED)),
    "yi-34b": Shape("01-ai/Yi-34B", "llama", 34_388_917_248, _decoder(60, 7168, 20480, 56, 8, 64000, 4096, **_rope(5e6), **UNTIED)),
    "smollm2-135m": Shape(
        "HuggingFaceTB/SmolLM2-135M", "llama", 134_515_008, _decoder(30, 576, 1536, 9, 3, 49152, 8192, **_rope(1e5), **TIED)
    ),
    "smollm2-360m": Shape(
        "HuggingFaceTB/SmolLM2-360M", "llama", 361_821_120, _decoder(32, 960, 2560, 15, 5, 49152, 8192, **_rope(1e5), **TIED)
    ),
    "smollm2-1.7b": Shape(
        "HuggingFaceTB/SmolLM2-1.7B", "llama", 1_711_376_384, _decoder(24, 2048, 8192, 32, 32, 49152, 8192, **_rope(1.3e5), **TIED)
    ),
}

REFUSED = {
    "mixtral-8x7b": "a mixture of experts",
    "mixtral-8x22b": "a mixture of experts",
    "qwen3-30b-a3b": "a mixture of experts",
    "qwen3-235b-a22b": "a mixture of experts",
    "gpt-oss-20b": "a mixture of experts",
    "gpt-oss-120b": "a mixture of experts",
    "gemma-3-4b": "multimodal",
    "gemma-3-12b": "multimodal",
    "gemma-3-27b": "multimodal",
}
"""Names that are asked for all the same, and why they are not trained."""

_ENDINGS = ("-instruct", "-chat", "-it", "-pt", "-hf", "-base")


def find_base(model: ModelConfig) -> Pretrained:
    """The base to plan with: from its folder or file where it is here, from the table where its hub id is known, else its config alone is
    fetched. Reads no weights, but for `model.format=stored` the headers of their files."""
    if model.keeps_stored or Path(model.path).expanduser().exists() or model.revision or "/" not in model.path:
        return find_model(model, weights=model.keeps_stored)
    shape = SHAPES.get(_by_key().get(_key(model.path), ""))
    if shape is None or _owner(shape.hub) != _owner(model.path):
        return find_model(model, weights=False)
    return Pretrained(model.path, Path(), None, shape.config(), False)


def hub_id(name: str) -> str:
    """What `model.path` should say for a name as a person writes it: `llama-3-70b`, `Qwen2.5 7B`. Paths and ids of other owners stay.

    Raises a `UserError` for a name that is neither a path nor known, with the closest.
    """
    if Path(name).expanduser().exists() or name.startswith("package:"):
        return name
    known = _by_key().get(_key(name))
    if known and _owner(name) in ("", _owner(SHAPES[known].hub)):
        return name if "/" in name else SHAPES[known].hub
    refused = next((why for other, why in REFUSED.items() if _squeezed(other) == _key(name)), None)
    if refused:
        raise UserError(f"--model {name}: that is {refused}. burnish trains dense language models of text alone.")
    if "/" in name:
        return name
    raise UserError(
        f"--model {name}: no such folder or file, and no model that is known without a download.{did_you_mean(name, list(SHAPES))}"
    )


@cache
def _by_key() -> dict[str, str]:
    keys = {key: name for name, shape in SHAPES.items() for key in (_key(name), _key(shape.hub))}
    return keys | {_squeezed(name.rpartition("-v")[0]): name for name in SHAPES if "-v" in name}  # without a version: its newest


def _key(name: str) -> str:
    """A name as it is compared: without its owner, case, hyphens, and what says how it was tuned."""
    word = re.sub(r"[\s_]+", "-", name.rpartition("/")[2].lower()).removeprefix("meta-").replace("-base-", "-").replace("-instruct-", "-")
    while (shorter := next((word.removesuffix(end) for end in _ENDINGS if word.endswith(end)), word)) != word:
        word = shorter
    return _squeezed(word)


def _squeezed(name: str) -> str:
    return name.replace("-", "")  # points stay: qwen2.5-7b is not qwen2-57b


def _owner(name: str) -> str:
    return name.rpartition("/")[0].lower()
