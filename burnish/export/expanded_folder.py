"""`burnish expand`: a model with new decoder blocks as an ordinary folder, which equals its base until it is trained.

(`adapt.method=expand` needs no such folder: it adds the blocks while it reads the base. This is for other programs.)
"""

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig, PretrainedConfig

from burnish.adapt.expand import Growth, growth, with_blocks
from burnish.config import AdaptConfig, ModelConfig, Plan
from burnish.errors import UserError
from burnish.export.shards import Shards
from burnish.export.tuned import SMALL_FILES_BYTES
from burnish.load.fill import Place, check, check_tied, slabs
from burnish.load.pretrained import Pretrained, find_model, read_tokenizer
from burnish.load.weights import Weights, open_weights
from burnish.model.network import refuse_unsupported
from burnish.parallel.world import alone
from burnish.runs import whole_folder
from burnish.skeleton import skeleton

BESIDE = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model", "tekken.json")
BESIDE += ("chat_template*", "generation_config.json", "LICENSE*", "USE_POLICY*", "NOTICE*")
"""Files of a model's folder that an expanded one has too."""

SHARD_BYTES = 5 * 10**9


def expand_folder(model: str, out: Path, new_blocks: int, advance: Callable[[int], None] = lambda _: None) -> Growth:
    """Writes `model` (a folder, a GGUF file or a hub id) with `new_blocks` new blocks to the folder `out`, whole or not at all.

    Every tensor keeps its values and dtype (where files mix dtypes: the widest); what the copies need is read twice. Costs one slab of
    rows of memory; `advance` is told the bytes written. Raises a `UserError` where `out` exists, where the number of blocks cannot be,
    where the disk has no room, and for models that burnish does not train (mixtures of experts …).
    """
    if out.exists():
        raise UserError(f"{out} exists already, and is not overwritten. Give another folder, or remove it first.")
    pretrained = find_model(ModelConfig(path=model))
    refuse_unsupported(pretrained.config, model)
    grown = growth(pretrained.config.num_hidden_layers, new_blocks, "--new-blocks")
    weights = open_weights(pretrained)
    places = _places(pretrained, new_blocks)
    check(places, weights)
    check_tied(places, weights)
    dtype = _dtype(places, weights)
    needed = sum(torch.Size(place.shape).numel() for place in places.values()) * dtype.itemsize + SMALL_FILES_BYTES
    _check_room(out, needed)
    with whole_folder(out) as temporary:
        shards = Shards(temporary, {name: place.shape for name, place in places.items()}, dtype, SHARD_BYTES)
        for name, place in places.items():
            advance(shards.add(name, (rows.to(dtype) for rows in _rows(place, weights))))
        shards.finish()
        _config(pretrained.config, grown, dtype).save_pretrained(temporary)
        _copy_beside(pretrained, temporary)
    return grown


def _places(pretrained: Pretrained, new_blocks: int) -> dict[str, Place]:
    """Every tensor of the expanded model and what it is filled from: of the network that would be trained, on meta."""
    plan = Plan(device="cpu", ranks=1, strategy="single", dtype="fp32", micro_batch=1, accumulation=1, checkpointing=False)
    asked = ModelConfig(path=pretrained.asked, format="none"), AdaptConfig(method="expand", new_blocks=new_blocks)
    return skeleton(pretrained.config, *asked, plan, alone("meta")).places


def _rows(place: Place, weights: Weights) -> Iterator[Tensor]:
    for start, stop in slabs(0, place.shape[0], place.shape):
        yield torch.zeros(stop - start, *place.shape[1:]) if place.zero else weights.rows(place.source, start, stop)


def _dtype(places: dict[str, Place], weights: Weights) -> torch.dtype:
    kinds = {weights.infos[place.source].dtype for place in places.values()}
    widest = kinds.pop()
    for kind in kinds:
        widest = torch.promote_types(widest, kind)
    return widest


def _check_room(out: Path, needed: int) -> None:
    there = next(place for place in out.absolute().parents if place.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(f"the expanded model takes {needed / 1e9:.1f} GB, and {there} has {free / 1e9:.1f} GB free. Choose another disk.")


def _config(config: PretrainedConfig, grown: Growth, dtype: torch.dtype) -> PretrainedConfig:
    changed = with_blocks(copy.deepcopy(config), grown.sources)
    changed.dtype = dtype
    if not changed.architectures:  # a GGUF file names none, and readers choose their class by it
        changed.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(changed)].__name__]  # pyright: ignore[reportAttributeAccessIssue]
    return changed


def _copy_beside(pretrained: Pretrained, folder: Path) -> None:
    """Tokenizer, chat template, licence: copied, or as the GGUF file holds them."""
    if pretrained.gguf is None:
        for file in sorted({file for pattern in BESIDE for file in pretrained.folder.glob(pattern) if file.is_file()}):
            shutil.copyfile(file, folder / file.name)
        return
    tokenizer = read_tokenizer(pretrained)
    tokenizer.save_pretrained(folder)
    GenerationConfig.from_model_config(pretrained.config).save_pretrained(folder)
