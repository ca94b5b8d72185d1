"""Text files as users have them."""

from pathlib import Path

from burnish.errors import UserError


def read_utf8(path: Path, setting: str) -> str:
    """A file's text with line ends as `\\n`. Raises a `UserError` that names `setting` where it is missing, a folder or not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Check {setting}.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; {setting} names files.") from None
    except UnicodeDecodeError as problem:
        way_out = f"Convert it, for example: iconv -f latin1 -t utf-8 {path.name}"
        raise UserError(f"{path} is not UTF-8 (byte {problem.start}). {way_out}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
