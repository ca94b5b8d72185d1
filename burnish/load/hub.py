"""Downloading a model from the Hugging Face hub: only the files that are read, resumable, with every refusal explained."""

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects

from burnish.errors import UserError, writing
from burnish.load.pretrained import NO_PICKLES, PICKLED, in_a_line
from burnish.load.safetensors_reader import open_safetensors

CONFIG = ["config.json", "generation_config.json"]
TOKENIZER = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "tokenizer.model",
    "spiece.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
]
# not *.safetensors: some repositories hold a second copy (consolidated.safetensors), or other variants
WEIGHTS = ["model.safetensors", "model-*.safetensors", "model.safetensors-*.safetensors", "model.safetensors.index.json"]
LICENSE = ["LICENSE*", "NOTICE*"]
CODE = ["*.py"]

log = logging.getLogger("burnish")


def fetch(hub_id: str, revision: str | None, weights: bool = True, code: bool = False) -> Path:
    """The folder of `hub_id` in the hub's local cache, with what is missing downloaded.

    Without `weights` that is the configuration alone; `.py` files come only with `code`. Never anything pickled. Where the
    connection breaks, the library goes on from the last 10 MB; a later call fetches anew only the files that were not complete.
    HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are obeyed; without a network the cache serves. Raises a `UserError` for
    everything that a user can act on.
    """
    patterns = CONFIG + (TOKENIZER + WEIGHTS + LICENSE if weights else []) + (CODE if code else [])
    with writing(Path(constants.HF_HUB_CACHE)), _explained(hub_id, revision):
        reachable = not constants.is_offline_mode() and _check_files(hub_id, revision)
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns, local_files_only=not reachable))


def is_downloaded(hub_id: str, revision: str | None = None) -> bool:
    """Whether the local cache holds all weights of a model; the hub is not asked."""
    try:
        open_safetensors(Path(snapshot_download(hub_id, revision=revision, allow_patterns=WEIGHTS, local_files_only=True)))
    except (LocalEntryNotFoundError, HFValidationError, UserError):  # not there, or half
        return False
    return True


def _check_files(hub_id: str, revision: str | None) -> bool:
    """Refuses a repository that cannot be used before a byte of it is downloaded. Returns whether there is a hub to download it from."""
    try:
        files = [file.rfilename for file in HfApi().model_info(hub_id, revision=revision).siblings or []]
    except HTTPError as problem:
        if isinstance(problem, HfHubHTTPError) and problem.response.status_code < 500:
            raise
        # no network, or a hub in trouble: the cache may still have it
        log.warning("the hub cannot be reached (%s); looking for %s in the local cache", problem, hub_id)
        return isinstance(problem, HfHubHTTPError)  # else each file would be asked for anew, and waited for
    if any(filter_repo_objects(files, allow_patterns=WEIGHTS)):
        return True
    pickled = [file for file in files if any(Path(file).match(pattern) for pattern in PICKLED)]
    ggufs = [file for file in files if file.endswith(".gguf")]
    if ggufs:
        raise UserError(
            f"{hub_id} holds GGUF files only. Download one (`hf download {hub_id} {ggufs[0]}`) and give its path as model.path."
        )
    if "adapter_config.json" in files:
        raise UserError(f"{hub_id} is an adapter, not a model. Give the base that it was trained on.")
    if pickled:
        raise UserError(f"{hub_id} holds its weights only as {pickled[0]}; nothing was downloaded. {NO_PICKLES}.")
    raise UserError(f"{hub_id} holds no model weights (model*.safetensors). Check the name: https://huggingface.co/{hub_id}.")


@contextmanager
def _explained(hub_id: str, revision: str | None) -> Iterator[None]:
    """Turns what the hub answers into what the user can do. Order matters: a gated model is also a `RepositoryNotFoundError`."""
    try:
        yield
    except GatedRepoError:
        raise UserError(_gated(hub_id)) from None
    except RepositoryNotFoundError as problem:
        raise UserError(_missing(hub_id, problem)) from None
    except RevisionNotFoundError:
        raise UserError(
            f"{hub_id} has no revision {revision!r}. Give a branch, tag or commit of it as model.revision, or leave it out."
        ) from None
    except HFValidationError as problem:
        raise UserError(f"{hub_id!r} is neither a folder nor a hub id: {problem}") from None
    except HfHubHTTPError as problem:
        raise UserError(_http(hub_id, problem)) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as problem:
        raise UserError(_not_cached(hub_id, revision, problem)) from None
    except HTTPError as problem:
        raise UserError(f"The download of {hub_id} broke off ({in_a_line(problem)}). {_AGAIN}") from None
    except OSError as problem:
        if problem.errno in (errno.EACCES, errno.EROFS):
            raise UserError(f"{constants.HF_HUB_CACHE} may not be written by this user. Set HF_HOME to another folder.") from None
        if "Consistency check failed" not in str(problem):
            raise
        raise UserError(f"The download of {hub_id} broke off: {in_a_line(problem)}. {_AGAIN}") from None


_AGAIN = "Check the connection and run the same command again: files that are complete are kept."
_LOG_IN = "run `hf auth login`, or set HF_TOKEN to a token from https://huggingface.co/settings/tokens"


def _gated(hub_id: str) -> str:
    page = f"https://huggingface.co/{hub_id}"
    if get_token() is None:
        return f"{hub_id} is gated: its owner asks for consent to terms. Accept them on {page}, then {_LOG_IN}."
    return (
        f"{hub_id} is gated, and the account of your token has no access (yet). "
        f"Accept the terms on {page} with that account; some owners take days to answer."
    )


def _missing(hub_id: str, problem: HfHubHTTPError) -> str:
    """The hub answers the same for a missing and for a private model, so as not to betray private ones."""
    both = f"{hub_id}: there is no such folder here, and the hub has no such model or does not show it (it answers the same for both)."
    if get_token() is None:
        return f"{both} Check the name. If it is private, {_LOG_IN}."
    return f"{both} Check the name. If it is private, your token's account has no access to it, or the token lacks the right to read it."


def _http(hub_id: str, problem: HfHubHTTPError) -> str:
    status = problem.response.status_code
    if status == 401:
        return (
            f"{hub_id}: the hub does not accept your token: it is mistyped, expired or withdrawn. Make a new one and {_LOG_IN}; "
            "for a public model, `hf auth logout` and an empty HF_TOKEN will do."
        )
    if status == 403:
        return f"{hub_id}: your token may not read this model. Give it the right to read it: https://huggingface.co/settings/tokens."
    if status == 429:
        return f"{hub_id}: the hub has had too many requests from here. Wait some minutes; logged-in users may send more: {_LOG_IN}."
    return f"{hub_id}: the hub answers with an error ({status}: {in_a_line(problem)}). Try again later; files that are complete are kept."


def _not_cached(hub_id: str, revision: str | None, problem: Exception) -> str:
    what = hub_id if revision is None else f"{hub_id} at {revision}"
    cached = f"is not, or not wholly, in the local cache ({constants.HF_HUB_CACHE})"
    if constants.is_offline_mode():
        return f"{what} {cached}, and HF_HUB_OFFLINE forbids downloading it. Unset it, or give a folder."
    why = f" ({in_a_line(problem)})" if problem.__cause__ is not None else ""  # without, the cache alone was looked at
    return (
        f"{what} {cached}, and {constants.ENDPOINT} cannot be reached{why}. "
        f"Check the connection, a proxy (HTTPS_PROXY) or a mirror (HF_ENDPOINT), or give a folder."
    )
