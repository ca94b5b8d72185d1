"""The writer `peft`: the adapter in PEFT's format, with tokenizer and card."""

from pathlib import Path
from typing import Any

from burnish.adapt.disk import save_adapter
from burnish.config import ExportConfig
from burnish.export.card import adapter_card
from burnish.export.tuned import SMALL_FILES_BYTES, Advance, Prompts, Tuned, main_alone, save_tokenizer
from burnish.parallel.world import barrier
from burnish.runs import write_whole


def bytes_needed(tuned: Tuned, config: ExportConfig) -> int:
    return SMALL_FILES_BYTES + sum(p.numel() * p.dtype.itemsize for p in tuned.built.adapters.trainable().values())


def write(tuned: Tuned, config: ExportConfig, folder: Path, prompts: Prompts, advance: Advance) -> dict[str, Any]:
    """The folder, whole or not at all; every rank must call it. Nothing is measured: these are the very tensors that were trained."""
    modules = [name for name, _ in tuned.built.model.named_modules()]
    with main_alone(folder) as temporary:
        save_adapter(tuned.built.adapters, tuned.adapt, temporary or folder, tuned.about, modules)
        if temporary is not None:
            save_tokenizer(tuned.template, temporary)
            write_whole(temporary / "README.md", adapter_card(tuned))
    advance(bytes_needed(tuned, config) - SMALL_FILES_BYTES)
    barrier()
    return {}
