"""The writer `transformers`: one folder of dense weights, which `AutoModelForCausalLM.from_pretrained` opens."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig, PretrainedConfig
from transformers.dynamic_module_utils import custom_object_save

from burnish.config import ExportConfig
from burnish.export.card import merged_card
from burnish.export.distance import measure
from burnish.export.merge import cast, merged_tensors
from burnish.export.shards import Shards
from burnish.export.tuned import SMALL_FILES_BYTES, Advance, Prompts, Tuned, main_alone, save_tokenizer
from burnish.model.network import DTYPES
from burnish.parallel.world import barrier
from burnish.runs import write_whole


def bytes_needed(tuned: Tuned, config: ExportConfig) -> int:
    return SMALL_FILES_BYTES + _weight_bytes(tuned, config)


def write(tuned: Tuned, config: ExportConfig, folder: Path, prompts: Prompts, advance: Advance) -> dict[str, Any]:
    """The folder, whole or not at all, and what `measure` found between it and the live model on `prompts`; every rank must call it."""
    with main_alone(folder) as temporary:
        _write_weights(tuned, config, temporary, advance)
        if temporary is not None:
            _save_config(tuned, DTYPES[config.dtype], temporary)
            generation_config(tuned).save_pretrained(temporary)
            save_tokenizer(tuned.template, temporary)
        measured = measure(tuned.built, temporary, _weight_bytes(tuned, config), prompts)
        if temporary is not None:
            write_whole(temporary / "README.md", merged_card(tuned, config, measured))
    barrier()
    return {"dtype": config.dtype, "distance": measured}


def _write_weights(tuned: Tuned, config: ExportConfig, folder: Path | None, advance: Advance) -> None:
    dtype = DTYPES[config.dtype]
    shapes = {name: place.shape for name, place in tuned.built.places.items()}
    shards = None if folder is None else Shards(folder, shapes, dtype, int(config.shard_gb * 1e9))
    for name, slabs in merged_tensors(tuned.built):
        if shards is not None:
            advance(shards.add(name, (cast(name, slab, dtype) for slab in slabs)))
    if shards is not None:
        shards.finish()


def _weight_bytes(tuned: Tuned, config: ExportConfig) -> int:
    return sum(torch.Size(place.shape).numel() for place in tuned.built.places.values()) * DTYPES[config.dtype].itemsize


def merged_config(tuned: Tuned, dtype: torch.dtype) -> PretrainedConfig:
    """The base's configuration for dense weights in `dtype`."""
    config = copy.deepcopy(tuned.built.model.config)
    config.dtype = dtype
    if not config.architectures:  # a GGUF file names none, and readers choose their class by it
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]  # pyright: ignore[reportAttributeAccessIssue]
    return config


def _save_config(tuned: Tuned, dtype: torch.dtype, folder: Path) -> None:
    """config.json, and beside it the model's own Python code where it has some: readers need it too."""
    config = merged_config(tuned, dtype)
    if getattr(config, "auto_map", None):
        custom_object_save(tuned.built.model, folder)  # the configuration brings its own file
        config.auto_map = {role: name.rpartition("--")[2] for role, name in config.auto_map.items()}  # of this folder, not of the base's
    config.save_pretrained(folder)


def generation_config(tuned: Tuned) -> GenerationConfig:
    """Greedy unless asked otherwise; it stops at whatever the base stops at, and at the tokens that end an answer in training."""
    config = tuned.built.model.config
    base = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stops = sorted({*tuned.template.stop_ids, *base} - {None})
    pad = tuned.template.tokenizer.pad_token_id
    return GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=stops, pad_token_id=config.pad_token_id if pad is None else pad)
