"""What each stage depends on. With an unchanged key it is not done again; a training with another one is never overwritten."""

from dataclasses import asdict
from typing import Any

from burnish.config import RunConfig, canonical
from burnish.errors import UserError
from burnish.load.pretrained import find_model
from burnish.load.weights import open_weights
from burnish.runs import Run, differences, digest, file_digest, read_manifest

TRAIN_VERSION = 2
"""2: packing has a stream of draws of its own, so that contexts come in another order."""
FINISHED_TOO = (1,)
"""Versions whose finished trainings stand: what they trained is served and evaluated as before."""
UNKEYED = ("log", "wandb_project", "keep", "checkpoint_every", "profile", "memory_snapshot", "validate_every")
"""Settings of `train` that change no weight."""


def check_data_unused(run: Run, key: dict[str, Any]) -> None:
    """Refuses to put other data where a training was made from what is there."""
    prepared, training = read_manifest(run.stage("data")), read_manifest(run.stage("train"))
    if prepared is None or training is None:
        return
    lines = "\n  ".join(differences(prepared["key"], key))
    raise UserError(
        f"{run.stage('train')} was trained on {run.stage('data')}, which these settings or files would replace:\n  {lines}\n"
        "Give this run another name (--name NAME), or prepare and train it anew and lose the old one (--redo data --redo train)."
    )


def plan_key(config: RunConfig, machine: Any, prepared: dict[str, int] | None) -> dict[str, Any]:
    """Config, machine and prepared data, as far as the plan and its report speak of them."""
    sections = {name: canonical(getattr(config, name)) for name in ("model", "adapt", "plan")}
    read = {name: getattr(config.train, name) for name in ("rows_per_step", "optimizer", "momentum", "keep")}
    reported = {name: canonical(getattr(config, name)) for name in ("evaluate", "export")}
    length = {"context": config.data.context, "prepared": prepared, "epochs": config.train.epochs, "steps": config.train.steps}
    where = {name: value for name, value in asdict(machine).items() if name != "host_of_here"}  # of a machine that is asked about alone
    return sections | reported | {"machine": where, "length": length, "train": read}


def check_same_training(config: RunConfig, run: Run) -> dict[str, Any]:
    """The key of `3-train`. A run that stands there with another is never overwritten: the error names what differs and the ways out."""
    key = train_key(config, run)
    manifest = read_manifest(run.stage("train"))
    if manifest is not None and manifest["key"] not in (key, *([key | {"stage": old} for old in FINISHED_TOO] if manifest["done"] else [])):
        lines = "\n  ".join(differences(manifest["key"], key))
        raise UserError(
            f"{run.stage('train')} was trained with other settings, and is never overwritten:\n  {lines}\n"
            "Give this run another name (--name NAME), or train it anew and lose the old one (--redo train)."
        )
    return key


def train_key(config: RunConfig, run: Run) -> dict[str, Any]:
    """What the trained weights depend on: not the number of ranks, nor the base's place on disk, nor what is only evaluated."""
    sections = {name: canonical(getattr(config, name)) for name in ("model", "adapt", "train")}
    sections["model"]["base"] = open_weights(find_model(config.model)).fingerprint()
    for name in ("path", "revision", "cache"):
        sections["model"].pop(name)
    for name in UNKEYED:
        sections["train"].pop(name)
    tokens = {file.name: file_digest(file) for file in sorted((run.stage("data") / "tokens" / "train").iterdir())}
    return sections | {"stage": TRAIN_VERSION, "tokens": tokens, "packing": {"context": config.data.context, "seed": config.data.seed}}


def data_digest(run: Run) -> str:
    """A name for what was prepared; empty where nothing is."""
    manifest = read_manifest(run.stage("data"))
    return digest(manifest["key"]) if manifest else ""
