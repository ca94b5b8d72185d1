"""The writer `peft`: the adapter in PEFT's format, with tokenizer and card."""

from pathlib import Path
from typing import Any

from burnish.adapt.disk import save_adapter
from burnish.adapt.methods import METHODS
from burnish.config import ExportConfig
from burnish.errors import UserError
from burnish.export.card import adapter_card
from burnish.export.tuned import SMALL_FILES_BYTES, Advance, Prompts, Tuned, main_alone, save_tokenizer
from burnish.parallel.world import barrier
from burnish.runs import write_whole


def bytes_needed(tuned: Tuned, config: ExportConfig) -> int:
    adapters = tuned.built.adapters
    names = {name: len(whole.names) for name, whole in adapters.whole.items()}  # PEFT knows no tie: each side is written
    parameters = adapters.trainable().items()
    return SMALL_FILES_BYTES + sum(p.numel() * p.dtype.itemsize * names.get(name, 1) for name, p in parameters)


def write(tuned: Tuned, config: ExportConfig, folder: Path, prompts: Prompts, advance: Advance) -> dict[str, Any]:
    """The folder, whole or not at all; every rank must call it. Nothing is measured: these are the very tensors that were trained.

    Raises a `UserError` where the method has no adapters.
    """
    if not METHODS[tuned.adapt.method].adapts:
        raise UserError(
            f"export.writers has 'peft', which holds adapters, and adapt.method = {tuned.adapt.method!r} has none. "
            'Set export.writers=["transformers"].'
        )
    modules = [name for name, _ in tuned.built.model.named_modules()]
    with main_alone(folder) as temporary:
        save_adapter(tuned.built.adapters, tuned.adapt, temporary or folder, tuned.about, modules)
        if temporary is not None:
            save_tokenizer(tuned.template, temporary)
            write_whole(temporary / "README.md", adapter_card(tuned))
    advance(bytes_needed(tuned, config) - SMALL_FILES_BYTES)
    barrier()
    return {}
