"""Block expansion as the original names it: a rate, and folders called `MODEL_blk_exp-OLD-NEW`."""

import re
from pathlib import Path

from burnish.compat.arguments import Argument, parse
from burnish.errors import UserError

EXPANDED = re.compile(r"_blk_exp-(\d+)-(\d+)")
ARGUMENTS = {
    "model_name": Argument(str, "meta-llama/Llama-2-7b-hf"),
    "output_dir": Argument(str, None),
    "expansion_rate": Argument(float, 0.1),
}
"""Of the original's scripts/block_expansion.py."""


def new_blocks_of(path: str | None) -> int:
    """How many blocks a folder says it has more than its base: by its own name, or by that of the only such folder in it.

    The original's block_expansion.py makes such a folder *in* its `--output_dir`, while its documentation gives that same directory to
    train.py, which then failed: both are understood here.
    """
    if path is None:
        raise UserError(
            "--llama_pro_path is missing: give the folder that scripts/block_expansion.py made, whose name ends in _blk_exp-OLD-NEW "
            "(only the number of new blocks is taken from it)"
        )
    named = EXPANDED.search(Path(path).name)
    if named is None:
        inside = sorted(folder for folder in Path(path).expanduser().glob("**/*_blk_exp-*") if folder.is_dir())
        if len(inside) != 1:
            found = "and there are several such folders in it" if inside else "and there is none such in it"
            raise UserError(f"--llama_pro_path {path}: its name does not end in _blk_exp-OLD-NEW, {found}. Name the folder itself")
        named = EXPANDED.search(inside[0].name)
    old, new = (int(number) for number in named.groups()) if named else (0, 0)
    if new <= old:
        raise UserError(f"--llama_pro_path {path}: its name says that it has no new blocks ({old} of {new} are old)")
    return new - old


def expansion(words: list[str]) -> tuple[str, Path, int]:
    """(model, folder to write, new blocks) of a command line of block_expansion.py.

    Reads the model's config.json for its number of layers. The folder has the name that the original gives it.
    """
    from burnish.config import ModelConfig
    from burnish.load.pretrained import find_model

    values = parse(words, ARGUMENTS).values
    layers: int = find_model(ModelConfig(path=values.model_name), weights=False).config.get_text_config().num_hidden_layers
    blocks = int(layers * values.expansion_rate)
    if blocks < 1:
        raise UserError(
            f"--expansion_rate {values.expansion_rate:g}: that is no whole block of {layers} layers. Give at least {1 / layers:.3g}"
        )
    if blocks > layers:
        raise UserError(f"--expansion_rate {values.expansion_rate:g}: there are {layers} layers to copy, and that would be {blocks}")
    root = Path(values.output_dir).expanduser() if values.output_dir else Path.home() / "models"
    named = Path(values.model_name).name if Path(values.model_name).is_absolute() else values.model_name.strip("/")
    return values.model_name, root / f"{named}_blk_exp-{layers}-{layers + blocks}", blocks
