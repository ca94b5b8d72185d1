"""The one exception that a user sees without a traceback."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path


class UserError(Exception):
    """Something that the user can act on: the thing, the reason, the way out. The command line prints it and exits with 2."""


def did_you_mean(word: str, known: list[str]) -> str:
    """` Did you mean x?`, or the whole list where nothing is close."""
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else f" Known: {', '.join(sorted(known))}."


_DISK = {
    errno.ENOSPC: "the disk is full. Free some space, then run the same command again",
    errno.EDQUOT: "the disk quota is used up. Free some space, then run the same command again",
    errno.EFBIG: "the file would be larger than this process may write (see `ulimit -f`). Raise the limit, then run the same command again",
    errno.EROFS: "the folder is on a read-only file system. Choose another one with `root=FOLDER`",
    errno.EACCES: "this user may not write there. Change its permissions or choose another folder with `root=FOLDER`",
    errno.EPERM: "nothing may be written there. Choose another folder with `root=FOLDER`",
    errno.ENOTDIR: "a file stands where a folder should be. Move it, or choose another folder with `root=FOLDER`",
}


def _errno(problem: Exception) -> int:
    """The system's error number, 0 where it is none. safetensors has an exception of its own, which holds the number as text."""
    if isinstance(problem, OSError):
        return problem.errno or 0
    said = re.search(r"\(os error (\d+)\)", str(problem)) if type(problem).__name__ == "SafetensorError" else None
    return int(said.group(1)) if said else 0


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what a disk can refuse into a `UserError` that names `path`; nothing else is caught."""
    try:
        yield
    except Exception as problem:
        reason = _DISK.get(_errno(problem))
        if reason is None:
            raise
        raise UserError(f"{path} could not be written: {reason}. Nothing that was saved before is touched.") from problem
