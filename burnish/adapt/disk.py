"""What was trained, on disk: adapters in PEFT's format, which `peft` loads; weights and new blocks under the model's own names.

adapter_model.safetensors  of adapters, by PEFT's names: base_model.model.LAYER.lora_A.weight [R, I], .lora_B.weight [O, R],
                           .lora_magnitude_vector [O]; and base_model.model.MODULE.weight of what is trained in full beside them
adapter_config.json        PEFT's LoraConfig, beside it
trained.safetensors        in the place of both where there are no adapters: fp32, by the model's names
burnish.json               {"burnish": "adapter/1", "fingerprint" of the base, "format", "block", "adapt", … what the caller adds}
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from burnish.adapt.attach import Adapters, scaling
from burnish.adapt.methods import METHODS
from burnish.config import AdaptConfig, ModelConfig, Plan, canonical, settings_of
from burnish.errors import UserError
from burnish.parallel.rows import local_rows, row_range, whole
from burnish.parallel.world import barrier, launched_rank
from burnish.runs import check_kind, read_json, whole_folder, write_json, write_whole

KIND = "adapter/1"
TENSORS, SETTINGS, HEADER = "adapter_model.safetensors", "adapter_config.json", "burnish.json"
TRAINED = "trained.safetensors"
KEYS = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}
"""Our parameters' names, and what PEFT's files call them after the layer's."""
PEFT_PREFIX = "base_model.model."

NEEDED = ("base", "fingerprint", "format", "block", "dtype", "template", "context")
"""What `about` must say: the base as asked for and its fingerprint; how its weights were held; compute dtype, chat template, context."""


def about_adapter(model: ModelConfig, plan: Plan, fingerprint: str, template: dict[str, Any], context: int) -> dict[str, Any]:
    """The `about` of `save_adapter`. `template` holds its `name`, `jinja` and `system`."""
    base = {"base": model.path, "revision": model.revision, "fingerprint": fingerprint, "format": model.held_as, "block": model.block}
    computed = {"ends": model.ends, "dtype": plan.dtype, "autocast": model.autocast}
    return base | computed | {"template": template, "context": context}


def tensors_file(folder: Path) -> Path | None:
    """The file of a saved folder that holds its tensors, or None where there is none."""
    return next((folder / name for name in (TENSORS, TRAINED) if (folder / name).is_file()), None)


def save_adapter(adapters: Adapters, config: AdaptConfig, folder: Path, about: dict[str, Any], modules: Iterable[str] = ()) -> None:
    """Writes what was trained as one folder, whole or not at all; what stood there is replaced. Every rank must call it: rows are gathered.

    `about` holds at least `NEEDED` (see `about_adapter`), and goes into `burnish.json`. `modules` are the names of all modules of the
    model: with them, PEFT is kept from adapting layers of the same names outside the decoder. Costs the trained bytes on the main
    rank's host, and one tensor elsewhere.
    """
    missing = [key for key in NEEDED if key not in about]
    assert not missing, f"about lacks {missing}"
    values: dict[str, Tensor] = {}
    for keys, parameter in _parameters(adapters):
        value = whole(parameter.detach())
        if launched_rank() == 0:
            values[keys[0]] = value.cpu().contiguous()
            values |= {key: values[keys[0]].clone() for key in keys[1:]}  # safetensors refuses tensors that share memory
    if launched_rank() == 0:
        with whole_folder(folder) as temporary:
            write_whole(temporary / _file(adapters), lambda path: save_file(values, path, metadata={"format": "pt"}))
            if adapters.by_name:
                write_json(temporary / SETTINGS, peft_config(adapters, config, about, modules))
            write_json(temporary / HEADER, about | {"burnish": KIND, "adapt": canonical(config)})
    barrier()


def load_adapter(adapters: Adapters, folder: Path, fingerprint: str) -> dict[str, Any]:
    """Puts the folder's values into what is trained, each rank its own rows, and turns the clock. Returns what `burnish.json` says.

    `fingerprint` is the base's. Raises a `UserError`, before any value is changed, where the folder belongs to another base or was made
    with other settings, and where its file is damaged, lacks a tensor, has one too many or one of another shape.
    """
    header = read_adapter_header(folder)
    if header["fingerprint"] != fingerprint:
        raise UserError(
            f"{folder} was trained on another base: on {header['base']} (fingerprint {header['fingerprint']}), and this one has the "
            f"fingerprint {fingerprint}. An adapter fits its own base alone: set model.path to that."
        )
    _check_settings(adapters, folder, header)
    path = folder / _file(adapters)
    try:
        with safe_open(path, framework="pt") as file:
            _check_tensors(adapters, path, {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()})  # noqa: SIM118 (not a dict)
            for keys, parameter in _parameters(adapters):
                start, stop = row_range(parameter)
                if start < stop:
                    with torch.no_grad():
                        local_rows(parameter).copy_(file.get_slice(keys[0])[start:stop])
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {path.name}: its copy is incomplete. Copy it again, or train anew.") from None
    except SafetensorError as problem:
        raise UserError(f"{path} is cut short or damaged ({problem}). Copy it again, or train anew.") from None
    adapters.switch.advance()
    return header


def read_adapter_header(folder: Path) -> dict[str, Any]:
    """What the adapter's `burnish.json` says, with no tensor read. Refuses one that a newer burnish wrote."""
    path = folder / HEADER
    if not path.is_file():
        alone = "an adapter that burnish did not write: nothing says which base it was trained on"
        found = alone if (folder / TENSORS).is_file() else "no adapter"
        raise UserError(f"{folder} holds {found} (there is no {HEADER}). Give the folder that burnish wrote.")
    header = read_json(path)
    check_kind(path, header.get("burnish") if isinstance(header, dict) else None, KIND)
    lost = [key for key in (*NEEDED, "adapt") if key not in header]
    if lost:
        raise UserError(f"{path} does not say the adapter's {', '.join(lost)}: it is damaged. Copy the folder again, or train anew.")
    return header


def peft_config(adapters: Adapters, config: AdaptConfig, about: dict[str, Any], modules: Iterable[str] = ()) -> dict[str, Any]:
    """`adapter_config.json`: PEFT's `LoraConfig` as plain values."""
    # whole names, since PEFT looks for modules whose names end so; both sides of a tie, since it would otherwise change one alone
    also = sorted({name for entry in adapters.whole.values() for name, _ in entry.modules})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": about["base"],
        "revision": about.get("revision"),
        "r": config.rank,
        # PEFT and its readers annotate it as a whole number
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "use_dora": METHODS[config.method].magnitude,
        "use_rslora": config.rank_stabilized,
        "target_modules": peft_targets(list(adapters.by_name), modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": also or None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def peft_targets(adapted: list[str], modules: Iterable[str] = ()) -> list[str] | str:
    """The adapted layers as PEFT finds them: their last names, or a pattern of whole names where those would find other `modules` too."""
    kinds, modules = sorted({name.rpartition(".")[2] for name in adapted}), tuple(modules)
    if all(name in adapted or name.rpartition(".")[2] not in kinds for name in modules):
        return kinds
    patterns = sorted({re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)) for name in adapted})
    pattern = "|".join(patterns)  # PEFT matches whole names against a string
    return sorted(adapted) if any(re.fullmatch(pattern, name) and name not in adapted for name in modules) else pattern


def _file(adapters: Adapters) -> str:
    return TENSORS if adapters.by_name else TRAINED


def _parameters(adapters: Adapters) -> list[tuple[tuple[str, ...], Tensor]]:
    """What is trained, by the file's names; a parameter that is tied has several beside adapters, for PEFT, which knows no tie."""
    named: list[tuple[tuple[str, ...], Tensor]] = []
    for name, parameter in adapters.trainable().items():
        if name in adapters.whole:
            names = adapters.whole[name].names
            named.append((tuple(f"{PEFT_PREFIX}{each}" for each in names) if adapters.by_name else (name,), parameter))
        else:
            layer, _, part = name.rpartition(".")
            named.append(((f"{PEFT_PREFIX}{layer}.{KEYS[part]}",), parameter))
    return named


def _check_settings(adapters: Adapters, folder: Path, header: dict[str, Any]) -> None:
    try:
        adapt = TypeAdapter(AdaptConfig).validate_python(header["adapt"])
    except ValidationError as problem:
        raise UserError(
            f"{folder / HEADER}: its section adapt is damaged ({problem.errors()[0]['msg']}). Copy it again, or train anew."
        ) from None
    pairs: dict[str, tuple[Any, Any]] = {"adapt.method": (adapt.method, adapters.method)}
    pairs |= {"model.ends": (header.get("ends", "none"), adapters.ends)}
    if adapters.by_name:
        first = next(iter(adapters.by_name.values()))
        pairs |= {"adapt.rank": (adapt.rank, first.a.shape[0]), "the update's scaling": (scaling(adapt), first.scaling)}
        held, here = settings_of(str(header["format"])), settings_of(getattr(first.base, "asked_format", str(header["format"])))
        pairs |= {f"model.{name}": (held[name], here[name]) for name in held}
        if {header["format"], header.get("ends", "none")} - {"none", "stored"}:
            pairs["model.block"] = (header["block"], getattr(first.base, "block", header["block"]))
    lines = [f"{name}: {theirs!r} in the adapter, {ours!r} here" for name, (theirs, ours) in pairs.items() if theirs != ours]
    if lines:
        raise UserError(
            f"{folder} was trained with other settings than this model is built with. Set these as they were:\n  " + "\n  ".join(lines)
        )


def _check_tensors(adapters: Adapters, path: Path, found: dict[str, tuple[int, ...]]) -> None:
    """Law 7: every tensor of the file has its place, every place its tensor, and both one shape."""
    places = {key: tuple(parameter.shape) for keys, parameter in _parameters(adapters) for key in keys}
    theirs, ours = _kinds(found), _kinds(places)
    if theirs != ours:
        there, here = ", ".join(sorted(theirs - ours)) or "none", ", ".join(sorted(ours - theirs)) or "none"
        raise UserError(
            f"{path} adapts other layers than this model is built with. Set adapt.targets as it was:\n"
            f"  adapted there alone: {there}\n  adapted here alone: {here}"
        )
    problems = [f"{key}: the model has no place for it" for key in sorted(found.keys() - places.keys())]
    problems += [f"{key}: the file does not hold it" for key in sorted(places.keys() - found.keys())]
    for key in sorted(found.keys() & places.keys()):
        if found[key] != places[key]:
            problems.append(f"{key}: {list(found[key])} in the file, {list(places[key])} in the model")
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UserError(f"{path} does not fit this model: it is damaged, or another model's.\n  " + "\n  ".join(problems[:20]) + more)


def _kinds(keys: Iterable[str]) -> set[str]:
    """`q_proj` of `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`."""
    return {re.sub(r"\.lora_.*", "", key).rpartition(".")[2] for key in keys if ".lora_" in key}
