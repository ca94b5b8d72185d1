"""Downloads against a hub on this machine: only the files that are read, going on where they broke off, every refusal explained."""

import errno
import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from burnish.config import ModelConfig
from burnish.errors import UserError
from burnish.load import hub as fetching
from burnish.load.hub import fetch, is_downloaded
from burnish.load.pretrained import find_model, read_tokenizer
from burnish.load.weights import open_weights

SHA = "0123456789abcdef0123456789abcdef01234567"
ID = "owner/tiny"


@dataclass
class Hub:
    """What the server has and does, and what it was asked for."""

    files: dict[str, bytes]
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    refuse_api: tuple[int, dict[str, str]] | None = None
    refuse_files: tuple[int, dict[str, str]] | None = None
    break_after: dict[str, list[int]] = field(default_factory=dict)
    """Of a file: bytes after which its next GETs are cut off, one number for each."""
    claimed: dict[str, int] = field(default_factory=dict)
    """Of a file: the length that its HEAD gives, where that is not the true one."""
    url: str = ""

    def asked_for(self, method: str = "GET") -> list[str]:
        marker = f"/{ID}/resolve/{SHA}/"
        return [path.removeprefix(marker) for done, path, _ in self.requests if done == method and path.startswith(marker)]

    def ranges(self, file: str) -> list[str]:
        return [headers["range"] for done, path, headers in self.requests if done == "GET" and path.endswith(file) and "range" in headers]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, {name.lower(): value for name, value in self.headers.items()}))
        if path.startswith("/api/models/"):
            self.api(path.removeprefix("/api/models/"))
        else:
            self.file(path)

    def api(self, path: str) -> None:
        if self.hub.refuse_api:
            return self.send(self.hub.refuse_api[0], b'{"error": "no"}', self.hub.refuse_api[1])
        if not path.startswith(ID):
            return self.send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        if "/revision/" in path and path.rpartition("/")[2] not in ("main", SHA):
            return self.send(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
        if "/tree/" in path:
            listed: Any = [{"type": "file", "path": name, "size": len(content), "oid": name} for name, content in self.hub.files.items()]
        else:
            listed = {"id": ID, "modelId": ID, "sha": SHA, "siblings": [{"rfilename": name} for name in self.hub.files]}
        self.send(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})

    def file(self, path: str) -> None:
        name = path.rpartition(f"/{SHA}/")[2]
        if self.hub.refuse_files:
            return self.send(self.hub.refuse_files[0], b"", self.hub.refuse_files[1])
        content = self.hub.files[name]
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": SHA}
        start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if "Range" in self.headers else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.command == "HEAD" and name in self.hub.claimed:
            content = bytes(self.hub.claimed[name])
        cuts = self.hub.break_after.get(name, []) if self.command == "GET" else []
        self.send(206 if start else 200, content[start:], headers, cuts.pop(0) if cuts else None)

    def send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that holds the tiny model, and beside it files that nobody needs."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    for unwanted in (
        "pytorch_model.bin",
        "consolidated.safetensors",
        "onnx/model.onnx",
        "modeling_tiny.py",
        "training_args.bin",
        "README.md",
    ):
        files[unwanted] = b"unwanted"
    files["LICENSE"] = b"free"
    hub = Hub(files)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("TinyHub", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    point_to(hub.url, tmp_path, monkeypatch)
    disable_progress_bars()
    yield hub
    enable_progress_bars()
    server.shutdown()
    server.server_close()
    thread.join()


def point_to(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT and HF_HOME do when the library is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)  # it goes on at whole chunks, which are of 10 MB
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library waits before it tries again


def test_a_download_holds_the_model_and_asks_for_nothing_else(hub: Hub) -> None:
    pretrained = find_model(ModelConfig(path=ID))
    assert "model.norm.weight" in open_weights(pretrained).infos
    assert read_tokenizer(pretrained).eos_token == "</s>"
    expected = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "LICENSE"}
    assert set(hub.asked_for()) == expected
    assert {file.name for file in pretrained.folder.iterdir()} == expected


def test_a_plan_downloads_the_configuration_alone(hub: Hub) -> None:
    assert find_model(ModelConfig(path=ID), weights=False).config.hidden_size == 64
    assert set(hub.asked_for()) == {"config.json", "generation_config.json"}


def test_code_is_downloaded_only_where_it_may_run(hub: Hub) -> None:
    fetch(ID, "main", weights=False, code=True)
    assert set(hub.asked_for()) == {"config.json", "generation_config.json", "modeling_tiny.py"}


def test_a_second_call_downloads_nothing(hub: Hub) -> None:
    folder = fetch(ID, None)
    hub.requests.clear()
    assert fetch(ID, None) == folder
    assert hub.asked_for() == []


def test_without_a_network_the_cache_serves(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = fetch(ID, None)
    point_to("http://127.0.0.1:9", tmp_path, monkeypatch)
    assert fetch(ID, None) == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(ID, None) == folder


def test_a_download_that_breaks_off_goes_on_where_it_stopped(hub: Hub) -> None:
    content = hub.files["model.safetensors"]
    hub.break_after["model.safetensors"] = [1000, 500]
    folder = fetch(ID, None)
    assert (folder / "model.safetensors").read_bytes() == content
    assert hub.ranges("model.safetensors") == ["bytes=1000-", "bytes=1500-"]


def test_a_download_that_failed_is_finished_by_the_next_call(hub: Hub) -> None:
    hub.break_after["model.safetensors"] = [1000, *[0] * 20]
    with pytest.raises(UserError, match=r"download of owner/tiny broke off.*files that are complete are kept"):
        fetch(ID, None)
    hub.break_after.clear()
    done = set(hub.asked_for()) - {"model.safetensors"}
    hub.requests.clear()
    assert (fetch(ID, None) / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert "tokenizer.json" in done
    assert not done & set(hub.asked_for())


def test_a_file_of_another_length_than_announced_is_not_kept(hub: Hub) -> None:
    hub.claimed["model.safetensors"] = len(hub.files["model.safetensors"]) + 1
    with pytest.raises(UserError, match=r"download of owner/tiny broke off: Consistency check failed.*files that are complete are kept"):
        fetch(ID, None)
    hub.claimed.clear()
    assert (fetch(ID, None) / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


def test_half_a_download_is_not_taken_for_a_model_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch(ID, None, weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"not, or not wholly, in the local cache.*HF_HUB_OFFLINE forbids"):
        fetch(ID, None)


# --- refusals


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"pytorch_model.bin": b""}, "only as pytorch_model.bin; nothing was downloaded.*run code when they are opened"),
        ({"tiny-Q4_0.gguf": b""}, "GGUF files only.*hf download owner/tiny tiny-Q4_0.gguf"),
        ({"adapter_config.json": b"", "adapter_model.safetensors": b""}, "is an adapter, not a model"),
        ({"README.md": b""}, "holds no model weights"),
    ],
)
def test_a_repository_that_cannot_be_used_is_refused_before_any_download(files: dict[str, bytes], message: str, hub: Hub) -> None:
    hub.files.clear()
    hub.files.update(files | {"config.json": b"{}"})
    with pytest.raises(UserError, match=message):
        fetch(ID, None)
    assert hub.asked_for() == hub.asked_for("HEAD") == []


@pytest.mark.parametrize(
    ("token", "message"),
    [(None, "Accept them on https://huggingface.co/owner/tiny, then run `hf auth login`"), ("hf_x", "account of your token has no access")],
)
def test_a_gated_model_is_explained(token: str | None, message: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.refuse_files = (403, {"X-Error-Code": "GatedRepo"})
    with pytest.raises(UserError, match=rf"owner/tiny is gated.*{message}"):
        fetch(ID, None)
    assert any(headers.get("authorization") == "Bearer hf_x" for _, _, headers in hub.requests) == (token is not None)


@pytest.mark.parametrize(
    ("token", "message"), [(None, "If it is private, run `hf auth login`"), ("hf_x", "your token's account has no access")]
)
def test_a_missing_model_may_be_a_private_one(token: str | None, message: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=rf"owner/absent.*answers the same for both.*{message}"):
        fetch("owner/absent", None)


def test_a_missing_revision_is_named(hub: Hub) -> None:
    with pytest.raises(UserError, match=r"owner/tiny has no revision 'v9'.*model.revision"):
        fetch(ID, "v9")


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "does not accept your token"),
        (403, {}, "your token may not read this model"),
        (500, {}, "cannot be reached .*500"),
    ],
)
def test_what_else_the_hub_refuses_is_explained(
    status: int, headers: dict[str, str], message: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    hub.refuse_api = (status, headers)
    with pytest.raises(UserError, match=message):
        fetch(ID, None)


def test_a_hub_out_of_reach_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_to("http://127.0.0.1:9", tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"not, or not wholly, in the local cache.*http://127.0.0.1:9 cannot be reached.*HTTPS_PROXY"):
        fetch(ID, None)


def test_a_hub_out_of_reach_is_asked_once_and_not_for_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_to("http://127.0.0.1:9", tmp_path, monkeypatch)
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    with pytest.raises(UserError, match=r"cannot be reached"):
        fetch(ID, None)
    assert sum(waits) < 5


def test_what_is_downloaded_is_known_without_asking_the_hub(hub: Hub) -> None:
    assert not is_downloaded(ID)
    fetch(ID, None, weights=False)
    assert not is_downloaded(ID)
    folder = fetch(ID, None)
    hub.requests.clear()
    assert is_downloaded(ID)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    assert not is_downloaded(ID), "half of it"
    index.write_text("no json")
    assert not is_downloaded(ID)
    assert not is_downloaded("no-such/model")
    assert not is_downloaded("not//a name")
    assert hub.requests == []


def test_an_impossible_name_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_to("http://127.0.0.1:9", tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"neither a folder nor a hub id"):
        fetch("owner/na--me", None)


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "hub could not be written: the disk is full"), (errno.EACCES, "hub may not be written by this user. Set HF_HOME")],
)
def test_a_disk_that_takes_no_more_is_named(number: int, message: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> str:
        raise OSError(number, "refused")

    monkeypatch.setattr(fetching, "snapshot_download", refused)
    with pytest.raises(UserError, match=message):
        fetch(ID, None)
