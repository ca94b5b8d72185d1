"""A run folder: one folder per stage with a manifest in each, metrics.jsonl and the log."""

import hashlib
import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from burnish.errors import UserError, writing

STAGES = {"data": "1-data", "plan": "2-plan", "train": "3-train", "evaluate": "4-evaluate", "export": "5-export"}
log = logging.getLogger("burnish")


@dataclass(frozen=True)
class Run:
    """A folder `runs/NAME`. Holds no state but the path."""

    folder: Path

    def stage(self, name: str) -> Path:
        """The folder of a stage, whether or not it exists yet."""
        return self.folder / STAGES[name]

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"


def open_run(root: str | Path, name: str) -> Run:
    """The run's folder, which whoever writes first makes. Raises a `UserError` where it cannot be written."""
    if not name.strip() or Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"name = {name!r}: a run is a folder inside {root}. Give a plain name; root=FOLDER puts all runs elsewhere.")
    run = Run(Path(root) / name)
    there = next(place for place in (run.folder, *run.folder.absolute().parents) if place.exists())
    try:  # makes no folder: a start that fails leaves none, and ranks are in nobody's way
        with writing(run.folder), TemporaryFile(dir=there):
            pass
    except FileNotFoundError:
        raise UserError(f"{run.folder}: no file can be made in {there}. Choose another folder with root=FOLDER.") from None
    return run


@contextmanager
def _no_empty_folders(folder: Path) -> Iterator[None]:
    """Folders on the way to `folder` that are not there yet go again where the block leaves them empty: a failed start leaves none."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    finally:
        for place in missing:
            with suppress(OSError):
                place.rmdir()


def find_run(path: str | Path) -> Run:
    """A run that exists already, for `chat` and the like."""
    folder = Path(path)
    if not any((folder / stage).is_dir() for stage in STAGES.values()):
        raise UserError(
            f"{folder} is not a run's folder (it has none of {', '.join(STAGES.values())}). Train one with `burnish run CONFIG.toml`."
        )
    return Run(folder)


def cache_root() -> Path:
    """BURNISH_CACHE, or ~/.cache/burnish."""
    return Path(os.environ.get("BURNISH_CACHE") or Path.home() / ".cache" / "burnish")


# --- writing whole or not at all


def write_whole(path: Path, content: bytes | str | Callable[[Path], None]) -> None:
    """Writes a file whole or not at all: a temporary file beside it, fsync, rename.

    `content` may be a writer that is given the temporary path.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with writing(path):
            if callable(content):
                content(temporary)
            else:
                temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
    finally:
        with suppress(OSError):  # a read-only disk refuses even to remove what is not there
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise UserError(f"{path} is damaged ({problem}). Remove its folder and run the stage again.") from None


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends without an error, and is removed otherwise."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    with _no_empty_folders(folder.parent):
        try:
            with writing(folder):
                temporary.mkdir(parents=True)
                yield temporary
                for file in (*temporary.rglob("*"), temporary):  # a folder too: its names are what would be lost
                    _sync(file)
                _exchange(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _exchange(new: Path, folder: Path) -> None:
    """Puts `new` in the place of `folder`. Two renames: killed between them, what was there lies beside it as `.NAME.PID.old`."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    had_one = folder.exists()
    if had_one:
        os.replace(folder, old)
    try:
        os.replace(new, folder)
    except OSError:
        if had_one:
            os.replace(old, folder)
        raise
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- manifests


def digest(value: Any) -> str:
    """A short name for plain JSON values: equal values, equal digest."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes; independent of its name and place."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def about() -> dict[str, Any]:
    """What is worth knowing and never compared: versions, command, machine, time."""
    versions = {"python": platform.python_version()}
    for package in ("burnish", "torch", "transformers", "bitsandbytes", "safetensors", "gguf"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    machine = {"platform": platform.platform(), "cores": os.cpu_count()}
    return {"versions": versions, "machine": machine, "command": sys.argv, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def write_manifest(folder: Path, key: dict[str, Any], *, done: bool = True, extra: dict[str, Any] | None = None) -> None:
    """`key` is compared when the stage is asked for again; `about` and `extra` are not."""
    write_json(folder / "manifest.json", {"burnish": "manifest/1", "done": done, "key": key, "about": about() | (extra or {})})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The stage's manifest, or None where there is none. Refuses one that a newer burnish wrote."""
    path = folder / "manifest.json"
    if not path.exists():
        return None
    manifest = read_json(path)
    check_kind(path, manifest.get("burnish") if isinstance(manifest, dict) else None, "manifest/1")
    return manifest


def check_kind(path: Path, found: Any, known: str) -> None:
    """Every file of ours says what it is; a newer one is refused, by name."""
    if found == known:
        return
    kind, _, number = known.partition("/")
    if (
        isinstance(found, str)
        and found.startswith(kind + "/")
        and found.partition("/")[2].isdigit()
        and int(found.partition("/")[2]) > int(number)
    ):
        raise UserError(f"{path} was written by a newer burnish (format {found}; this one reads {known}). Update burnish to read it.")
    raise UserError(
        f"{path} says that it is {found!r}, not {known!r}: it is damaged, or not burnish's. Remove its folder and run the stage again."
    )


def is_done(folder: Path, key: dict[str, Any]) -> bool:
    """Whether the stage stands there finished, made from just these inputs."""
    manifest = read_manifest(folder)
    return manifest is not None and manifest["done"] and manifest["key"] == key


class _NotThere:
    def __repr__(self) -> str:
        return "(not there)"


NOT_THERE = _NotThere()


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """`train.lr: 0.0002 → 0.001`, one line for each leaf that differs; a key that one side lacks differs from one that is None."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for name in sorted(old.keys() | new.keys()):
            lines += differences(old.get(name, NOT_THERE), new.get(name, NOT_THERE), f"{prefix}.{name}" if prefix else name)
        return lines
    return [] if old == new else [f"{prefix}: {old!r} → {new!r}"]
