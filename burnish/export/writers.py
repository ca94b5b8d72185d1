"""What can be written, and the stage: each writer's folder below the stage's."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.adapt.methods import writers
from burnish.config import ExportConfig
from burnish.export import adapter_folder, gguf_folder, merged_folder
from burnish.export.distance import in_words
from burnish.export.tuned import Advance, Prompts, Tuned, check_room
from burnish.parallel.world import launched_rank

log = logging.getLogger("burnish")


@dataclass(frozen=True)
class Writer:
    """One kind of folder that others read. Both functions are called on every rank."""

    bytes_needed: Callable[[Tuned, ExportConfig], int]
    write: Callable[[Tuned, ExportConfig, Path, Prompts, Advance], dict[str, Any]]
    """(…, its folder, prompts as token ids, progress in bytes) → its part of the report."""


WRITERS: dict[str, Writer] = {
    "peft": Writer(adapter_folder.bytes_needed, adapter_folder.write),
    "transformers": Writer(merged_folder.bytes_needed, merged_folder.write),
    "gguf": Writer(gguf_folder.bytes_needed, gguf_folder.write),
}


def export(
    tuned: Tuned, config: ExportConfig, folder: Path, prompts: Prompts = (), advance: Advance = lambda _: None
) -> dict[str, dict[str, Any]]:
    """Writes `folder/WRITER` for each writer that is asked for; each appears whole or not at all. Every rank must call it.

    Refuses, before it writes, what the disk has no room for. On `prompts` a dense folder is compared with the live model. Returns each
    writer's report, complete on the main rank; `advance` comes to `bytes_needed` or a little less.
    """
    if launched_rank() == 0:
        check_room(folder, bytes_needed(tuned, config))
    report = {}
    for name in writers(config, tuned.adapt):
        report[name] = WRITERS[name].write(tuned, config, folder / name, prompts, advance)
        if launched_rank() == 0:
            compared = report[name].get("distance")
            log.info("export: %s is written%s", name, f"; {in_words(compared)}" if compared else "")
    return report


def bytes_needed(tuned: Tuned, config: ExportConfig) -> int:
    """Bytes on disk of all that is asked for, a little more than they take."""
    return sum(WRITERS[name].bytes_needed(tuned, config) for name in writers(config, tuned.adapt))
