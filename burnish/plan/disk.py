"""What a run writes on this machine's disks (its folder, the download of its base, the quantized cache), and what is free there."""

import shutil
from dataclasses import replace
from pathlib import Path

from huggingface_hub import constants

from burnish.adapt.methods import writers
from burnish.config import RunConfig
from burnish.load.hub import is_downloaded
from burnish.load.pretrained import Pretrained
from burnish.model.network import DTYPES
from burnish.plan.bytes import Persistent
from burnish.plan.machine import Machine
from burnish.plan.report import Part, Phase
from burnish.runs import cache_root


def on_disk(config: RunConfig, kept: Persistent, local: bool) -> tuple[Phase, ...]:
    """What is written, and where: of what lies on one disk, each has the room that those before it leave. `kept` is of one process.

    `local` says that the base's files are here already.
    """
    written = [(Path(config.root), run_folder(config, kept))]
    if not local:
        files = (Part("files of the base, in 16 bits", kept.published),)
        smaller = "Set HF_HUB_CACHE to a folder on another disk."
        written.append((Path(constants.HF_HUB_CACHE), Phase("download", "disk", files, 0, required=False, way_out=smaller)))
    if config.model.cache and config.model.format not in ("none", "stored"):
        base, without = (Part("base in its format", kept.cached),), "Without it each start quantizes anew."
        written.append((cache_root(), Phase("quantized cache", "disk", base, 0, required=False, way_out=without)))
    phases: list[Phase] = []
    taken: dict[int, int] = {}
    for folder, phase in written:
        disk = _existing(folder).stat().st_dev
        phases.append(replace(phase, limit_bytes=max(0, _free(folder) - taken.get(disk, 0))))
        taken[disk] = taken.get(disk, 0) + phase.bytes
    return tuple(phases)


def is_local(pretrained: Pretrained, machine: Machine, revision: str | None) -> bool:
    """Whether the base's weights are on the machine, and not to be downloaded first. Files that a user names are taken to be."""
    if pretrained.gguf is not None or Path(pretrained.asked).expanduser().exists():
        return True
    return machine.here and is_downloaded(pretrained.asked, revision)


def run_folder(config: RunConfig, kept: Persistent) -> Phase:
    """Checkpoints (one more than are kept, while the newest is written), the adapter, and what is exported. `kept` is of one process."""
    parts = [Part("checkpoints", (config.train.keep + 1) * kept.kept), Part("adapter", kept.trained)]
    sizes = {
        "peft": kept.trained,
        "transformers": kept.weights * DTYPES[config.export.dtype].itemsize,
        "gguf": kept.cached + kept.trained,  # a file holds no more than the model does in memory
    }
    for writer in writers(config.export, config.adapt):
        parts.append(Part(f"export as {writer}", sizes[writer]))
    fewer = "Set root to a folder on another disk, or lower train.keep."
    return Phase("run folder", "disk", tuple(parts), _free(Path(config.root)), way_out=fewer)


def _free(folder: Path) -> int:
    """Free bytes where the folder is or will be."""
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder
