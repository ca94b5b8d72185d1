"""What is exported, and what every writer does alike."""

import copy
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.config import AdaptConfig
from burnish.data.template import Template
from burnish.errors import UserError
from burnish.parallel.world import launched_rank
from burnish.runs import whole_folder
from burnish.skeleton import Built

SMALL_FILES_BYTES = 64 << 20
"""Room for configuration, tokenizer and card: the largest tokenizers take half of it."""


Prompts = Sequence[Sequence[int]]
"""Token ids on which what was written is compared with the live model."""

Advance = Callable[[int], None]
"""Is told the bytes written since it was last called."""


@dataclass(frozen=True)
class Tuned:
    """A trained model and what must go with it, whoever reads it."""

    built: Built
    template: Template
    """With its tokenizer: the served model must read what the trained one read."""
    adapt: AdaptConfig
    about: dict[str, Any]
    """What `burnish.json` of its adapter says: see `burnish.adapt.disk.about_adapter`."""


def main_alone(folder: Path) -> AbstractContextManager[Path | None]:
    """A temporary folder that becomes `folder` at the end of the block, on the main rank; None on the others."""
    return whole_folder(folder) if launched_rank() == 0 else nullcontext(None)


def check_room(folder: Path, needed_bytes: int) -> None:
    """Refuses before anything is written what the disk of `folder` has no room for."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < needed_bytes:
        raise UserError(
            f"the export takes {needed_bytes / 1e9:.1f} GB, and the disk of {folder.parent} has {free / 1e9:.1f} GB free. Free some space, "
            "choose another disk with root=FOLDER, or fewer writers with export.writers."
        )


def save_tokenizer(template: Template, folder: Path) -> None:
    """The tokenizer's files, with the chat template that the model was trained on."""
    tokenizer = copy.deepcopy(template.tokenizer)
    tokenizer.chat_template = template.jinja
    tokenizer.save_pretrained(folder)
