"""What is written is whole or not there, what was saved survives a disk that refuses, and a manifest tells whether a stage is done."""

import os
import resource
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from burnish.errors import UserError, writing
from burnish.runs import (
    Run,
    check_kind,
    differences,
    digest,
    file_digest,
    find_run,
    is_done,
    open_run,
    read_json,
    read_manifest,
    whole_folder,
    write_json,
    write_manifest,
    write_whole,
)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


# --- one file


@pytest.mark.parametrize("content", ["text é", b"bytes", lambda path: path.write_bytes(b"by a writer")], ids=["text", "bytes", "writer"])
def test_a_file_is_written_whole_in_the_place_of_the_old_one(tmp_path, content):
    file = tmp_path / "file"
    file.write_text("old")
    write_whole(file, content)
    assert file.read_bytes() in ("text é".encode(), b"bytes", b"by a writer")
    assert leftovers(tmp_path) == []


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")

    def fails(path: Path) -> None:
        path.write_text("half of it")
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        write_whole(file, fails)
    assert file.read_text() == "old"
    assert leftovers(tmp_path) == []


def test_the_new_file_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    order = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: order.append("sync") or sync(handle))
    monkeypatch.setattr(os, "replace", lambda old, new: order.append("rename") or replace(old, new))
    write_whole(tmp_path / "file", "new")
    assert order == ["sync", "rename", "sync"]  # the file, its name, the folder that holds the name


# --- one folder


def test_a_folder_takes_the_place_of_the_old_one_whole(tmp_path):
    folder = tmp_path / "stage"
    folder.mkdir()
    (folder / "old").write_text("old")
    with whole_folder(folder) as new:
        (new / "inner").mkdir()
        (new / "inner" / "file").write_text("new")
        assert (folder / "old").exists()
    assert [path.name for path in folder.rglob("*")] == ["inner", "file"]
    assert leftovers(tmp_path) == []


def test_a_folder_that_fails_leaves_the_old_one_and_nothing_else(tmp_path):
    folder = tmp_path / "stage"
    folder.mkdir()
    (folder / "old").write_text("old")

    def fails() -> None:
        with whole_folder(folder) as new:
            (new / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert [path.name for path in folder.iterdir()] == ["old"]
    assert leftovers(tmp_path) == []


def test_an_old_folder_is_put_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    folder = tmp_path / "stage"
    folder.mkdir()
    (folder / "old").write_text("old")
    replace = os.replace

    def refuses(old: Path, new: Path) -> None:
        if str(old).endswith(".partial"):
            raise OSError(28, "No space left on device")
        replace(old, new)

    monkeypatch.setattr(os, "replace", refuses)
    with pytest.raises(UserError, match="the disk is full"), whole_folder(folder) as new:
        (new / "file").write_text("new")
    assert [path.name for path in folder.iterdir()] == ["old"]
    assert leftovers(tmp_path) == []


# --- disks that refuse, for real


SAVE = """
    import sys
    from pathlib import Path
    import numpy
    from safetensors.numpy import save_file
    from burnish.errors import UserError
    from burnish.runs import whole_folder, write_whole

    place, way = Path(sys.argv[1]), sys.argv[2]
    large = b"x" * 300_000
    try:
        if way == "bytes":
            write_whole(place / "kept", large)
        elif way == "safetensors":
            write_whole(place / "kept", lambda path: save_file({"a": numpy.zeros(100_000, "float32")}, path))
        else:
            with whole_folder(place / "stage") as folder:
                save_file({"a": numpy.zeros(100_000, "float32")}, folder / "a.safetensors")
    except UserError as problem:
        print(problem)
        sys.exit(2)
"""
"""Exits with 2 and the message where the disk refuses in words that a user can act on; anything else is a traceback and 1."""


def saved(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with something saved in it."""
    folder = tmp_path / "place"
    (folder / "stage").mkdir(parents=True)
    (folder / "kept").write_text("saved before")
    (folder / "stage" / "kept").write_text("saved before")
    return folder


def save(command: list[str], place: Path, way: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*command, sys.executable, "-c", textwrap.dedent(SAVE), str(place), way], capture_output=True, text=True, timeout=60, **options
    )


WAYS = pytest.mark.parametrize("way", ["bytes", "safetensors", "folder"])


@WAYS
def test_a_file_larger_than_the_process_may_write_is_a_user_error_and_loses_nothing(place, way):
    before = saved(place)
    done = save([], place, way, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert (done.returncode, "ulimit -f" in done.stdout) == (2, True), done.stderr
    assert "Nothing that was saved before is touched" in done.stdout
    assert saved(place) == before


def mounted(place: Path, options: str, way: str) -> subprocess.CompletedProcess:
    """Saves on a file system of its own that holds a copy of `place`; what it ends with is copied to `place`.after."""
    script = f"""
        set -e
        mount -t tmpfs -o size=200k tmpfs {place}.mounted
        cp -r {place}/. {place}.mounted/
        {f"mount -o remount,{options} {place}.mounted" if options else ""}
        set +e
        "$@"
        code=$?
        cp -r {place}.mounted/. {place}.after/
        exit $code
    """
    for name in ("mounted", "after"):
        place.with_name(f"place.{name}").mkdir()
    return save(["unshare", "-rm", "bash", "-c", textwrap.dedent(script), "bash"], place.with_name("place.mounted"), way)


def may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    script = "d=$(mktemp -d) && mount -t tmpfs -o size=100k tmpfs $d; r=$?; umount $d; rmdir $d; exit $r"
    return subprocess.run(["unshare", "-rm", "bash", "-c", script], capture_output=True, check=False).returncode == 0


@WAYS
@pytest.mark.parametrize(("options", "message"), [("", "the disk is full"), ("ro", "read-only file system")], ids=["full", "read-only"])
def test_a_disk_that_is_full_or_read_only_is_a_user_error_and_loses_nothing(place, way, options, message):
    if not may_mount():
        pytest.skip("mounting in a name space of one's own is not permitted here")
    done = mounted(place, options, way)
    assert (done.returncode, message in done.stdout) == (2, True), done.stderr
    assert saved(place.with_name("place.after")) == saved(place)


def test_a_folder_that_may_not_be_written_is_a_user_error(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("burnish.runs.TemporaryFile", refuse)
    with pytest.raises(UserError, match="this user may not write there"):
        open_run(tmp_path, "run")


def test_many_ranks_open_a_run_at_the_same_moment(tmp_path):
    """As torchrun starts them: each looks whether it can write there, and none is in another's way."""
    with ThreadPoolExecutor(8) as ranks:
        folders = [opened.folder for opened in ranks.map(lambda _: open_run(tmp_path, "run"), range(400))]
    assert set(folders) == {tmp_path / "run"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("root", "said"), [("/proc/x", "no file can be made in /proc"), ("file", "a file stands where a folder should be")]
)
def test_a_root_that_cannot_be_made_is_a_user_error(tmp_path, root, said):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=said):
        open_run(tmp_path / root, "run")


def test_errors_that_no_disk_makes_are_left_alone(tmp_path):
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        _ = 1 / 0
    with pytest.raises(FileNotFoundError), writing(tmp_path):
        (tmp_path / "none" / "file").write_text("")


# --- manifests


KEY = {"train": {"lr": 2e-4, "steps": None}, "data": "abc"}


def test_a_stage_is_done_when_it_stands_there_finished_with_the_same_key(tmp_path):
    assert not is_done(tmp_path, KEY)
    write_manifest(tmp_path, KEY, done=False)
    assert not is_done(tmp_path, KEY)
    write_manifest(tmp_path, KEY, extra={"seconds": 3})
    assert is_done(tmp_path, KEY)
    assert not is_done(tmp_path, KEY | {"data": "abd"})


def test_what_is_only_worth_knowing_is_never_compared(tmp_path):
    write_manifest(tmp_path, KEY, extra={"seconds": 3})
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert manifest["about"]["seconds"] == 3
    assert {"versions", "machine", "command", "time"} <= manifest["about"].keys()
    assert is_done(tmp_path, KEY)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (KEY, KEY, []),
        ({"train": {"lr": 1}}, {"train": {"lr": 2}}, ["train.lr: 1 → 2"]),
        ({"a": 1, "b": {"c": "x", "d": 1}}, {"a": 2, "b": {"c": "y", "d": 1}}, ["a: 1 → 2", "b.c: 'x' → 'y'"]),
        ({"a": [1, 2]}, {"a": [1, 3]}, ["a: [1, 2] → [1, 3]"]),
        ({}, {"a": 1}, ["a: (not there) → 1"]),
        ({"a": {"b": 1}}, {}, ["a: {'b': 1} → (not there)"]),
        ({}, {"a": None}, ["a: (not there) → None"]),  # else a stage is not done and nothing says why
    ],
)
def test_every_leaf_that_differs_is_told(old, new, expected):
    assert differences(old, new) == expected
    assert bool(expected) == (old != new)


def test_a_newer_manifest_is_refused_and_a_strange_one_too(tmp_path):
    for kind, message in (
        ("manifest/2", "written by a newer burnish"),
        ("adapter/1", "is damaged, or not burnish's"),
        (None, "is damaged"),
        (7, "is damaged"),
    ):
        write_json(tmp_path / "manifest.json", {"burnish": kind})
        with pytest.raises(UserError, match=message):
            read_manifest(tmp_path)
    write_json(tmp_path / "manifest.json", ["a list"])
    with pytest.raises(UserError, match="is damaged"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("found", "newer"), [("tokens/2", True), ("tokens/10", True), ("tokens/0", False), ("tokens/x", False), ("token/2", False)]
)
def test_newer_is_told_from_damaged(found, newer):
    with pytest.raises(UserError, match="newer burnish" if newer else "is damaged"):
        check_kind(Path("header.json"), found, "tokens/1")


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe{}"])
def test_a_damaged_json_file_is_named(tmp_path, content):
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(UserError, match=r"state\.json is damaged"):
        read_json(tmp_path / "state.json")


def test_digests_depend_on_values_and_on_no_order(tmp_path):
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    (tmp_path / "one").write_bytes(b"same")
    (tmp_path / "two").write_bytes(b"same")
    assert file_digest(tmp_path / "one") == file_digest(tmp_path / "two")
    (tmp_path / "two").write_bytes(b"sane")
    assert file_digest(tmp_path / "one") != file_digest(tmp_path / "two")


def test_a_run_is_found_by_its_stages(tmp_path):
    with pytest.raises(UserError, match=r"is not a run's folder \(it has none of 1-data, "):
        find_run(tmp_path)
    run = open_run(tmp_path, "first")
    run.stage("train").mkdir(parents=True)
    assert find_run(tmp_path / "first") == Run(tmp_path / "first") == run
    assert leftovers(run.folder) == []


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", " "])
def test_a_run_outside_its_root_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="a run is a folder inside"):
        open_run(tmp_path / "runs", name)
    assert list(tmp_path.iterdir()) == []
