"""What a run can be continued from: full-shape tensors by name, so that any number of ranks can read it. No pickle anywhere.

    checkpoints/step-000100/   trainable.safetensors   what is trained
                               moments.safetensors     NAME/exp_avg …, or what else the optimizer keeps
                               random.safetensors      the random state of each rank
                               state.json              step, position in the data, scale of the loss
The folder appears by a rename when all of it is on disk.
"""

import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from burnish.config import TrainConfig
from burnish.errors import UserError
from burnish.parallel.rows import local_rows, row_range, shards_of, whole
from burnish.parallel.world import World, barrier, each_rank
from burnish.runs import check_kind, read_json, whole_folder, write_json
from burnish.train import optimizer as optimizers
from burnish.train.blockwise import Blockwise

KIND = "checkpoint/1"


@dataclass(frozen=True)
class State:
    """Where a run stands between two steps."""

    steps_done: int
    position: int
    """Packed contexts trained since the start."""
    supervised_tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    """Steps whose gradient was not finite in fp16, and which were not taken."""
    scale: float = 1.0
    """What the loss is multiplied with: see `scaler.py`."""
    since_scaled: int = 0
    """Steps taken since the scale last changed."""


def save(folder: Path, state: State, trainable: dict[str, nn.Parameter], optimizer: Optimizer, config: TrainConfig, world: World) -> Path:
    """Writes `folder/step-NNNNNN`, whole or not at all. A collective: every rank calls it, one writes."""
    target = folder / f"step-{state.steps_done:06d}"
    weights = {name: _on_main(parameter, world) for name, parameter in trainable.items()}
    moments = {f"{name}/{moment}": _on_main(tensor, world) for name, moment, tensor in optimizers.moments(optimizer, trainable)}
    random = {f"{rank}/{device}": rng for device, own in random_state(world).items() for rank, rng in enumerate(each_rank(own, world))}
    if world.is_main:
        with whole_folder(target) as temporary:
            save_file(_present(weights), temporary / "trainable.safetensors")
            save_file(_present(moments), temporary / "moments.safetensors")
            save_file(random, temporary / "random.safetensors")
            header = {"burnish": KIND, "ranks": world.size, "shards": _shards(trainable)}
            write_json(temporary / "state.json", {**header, **asdict(state)})
        _prune(folder, config.keep)
    barrier()
    return target


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None. What a killed save left has another name and is never found."""
    found = _saved(folder)
    return found[-1] if found else None


def load(path: Path, trainable: dict[str, nn.Parameter], optimizer: Optimizer, world: World) -> State:
    """A checkpoint's values into this rank's rows, whatever number of ranks wrote it; the random state where that number is the same."""
    header = read_json(path / "state.json")
    check_kind(path / "state.json", header.pop("burnish"), KIND)
    ranks = header.pop("ranks")
    shards = header.pop("shards", ranks)
    _read_into(path / "trainable.safetensors", dict(trainable))
    wanted = {f"{name}/{moment}": tensor for name, moment, tensor in optimizers.moments(optimizer, trainable)}
    if isinstance(optimizer, Blockwise) and shards != _shards(trainable):
        _read_recut(path / "moments.safetensors", wanted, trainable, optimizer, shards)
    else:
        _read_into(path / "moments.safetensors", wanted)
    optimizers.set_steps_done(optimizer, header["steps_done"] - header.get("skipped", 0))
    if ranks == world.size:
        with _opened(path / "random.safetensors") as file:
            set_random_state({device: file.get_tensor(f"{world.rank}/{device}") for device in random_state(world)}, world)
    return State(**header)


def random_state(world: World) -> dict[str, Tensor]:
    """The states that dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(world.device)} if world.device.type == "cuda" else states


def set_random_state(states: dict[str, Tensor], world: World) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], world.device)


def _on_main(tensor: Tensor, world: World) -> Tensor | None:
    full = whole(tensor).detach()
    return full.cpu().contiguous() if world.is_main else None


def _present(tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as problem:
        raise UserError(
            f"{path} cannot be read ({problem}). Remove the folder {path.parent.name}; the run continues from the one before it."
        ) from None


def _shards(trainable: dict[str, nn.Parameter]) -> int:
    return shards_of(next(iter(trainable.values())))


def _check_names(path: Path, file: safe_open, wanted: Iterable[str]) -> None:
    wrong = sorted(set(file.keys()) ^ set(wanted))
    if wrong:
        raise UserError(
            f"{path} holds other tensors than this run trains ({wrong[0]} and {len(wrong) - 1} more): it belongs to another run."
        )


def _read_recut(path: Path, wanted: dict[str, Tensor], trainable: dict[str, nn.Parameter], optimizer: Blockwise, shards: int) -> None:
    with _opened(path) as file:
        _check_names(path, file, wanted)
        for name, parameter in trainable.items():
            kept = [moment for moment in optimizer.state[parameter] if moment != "step"]
            optimizer.recut(parameter, {moment: file.get_tensor(f"{name}/{moment}") for moment in kept}, shards)


def _read_into(path: Path, tensors: dict[str, Tensor]) -> None:
    with _opened(path) as file:
        _check_names(path, file, tensors)
        for name, tensor in tensors.items():
            start, stop = row_range(tensor)
            with torch.no_grad():
                local_rows(tensor).copy_(file.get_slice(name)[start:stop])


def _saved(folder: Path) -> list[Path]:
    """The whole checkpoints, oldest first."""
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def _prune(folder: Path, keep: int) -> None:
    for old in _saved(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
