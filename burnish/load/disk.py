"""Reading bytes of a file without mapping it: what was read is in the caller's buffer and nowhere else."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.errors import UserError


def read_into(buffer: memoryview, path: Path, offset: int) -> None:
    """Fills `buffer` (bytes) with the file's bytes from `offset` on.

    The file is opened for each call (microseconds, against slabs of megabytes), so that no reader holds handles and any
    reader may be sent to another process. Not mapped: a mapping counts every page that was ever read as this process's memory.
    Raises a `UserError` where the file ends too early or cannot be read.
    """
    try:
        with path.open("rb", buffering=0) as file:
            done = 0
            while done < len(buffer):
                got = os.preadv(file.fileno(), [buffer[done:]], offset + done)
                if got == 0:
                    raise UserError(f"{path} ends at byte {offset + done}, in the middle of a tensor. Copy or download it again.")
                done += got
    except FileNotFoundError:
        raise UserError(f"{path} is gone. It was there when the model was opened; put it back and start again.") from None
    except PermissionError:
        raise UserError(f"{path} may not be read by this user. Change its permissions.") from None


def read_bytes(path: Path, offset: int, count: int) -> bytearray:
    """`count` bytes of the file from `offset` on."""
    buffer = bytearray(count)
    read_into(memoryview(buffer), path, offset)
    return buffer


def read_tensor(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A new contiguous tensor holding the file's bytes from `offset` on; costs no other memory than its own."""
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.numel():
        content: Any = tensor.view(-1).view(torch.uint8).numpy()
        read_into(memoryview(content), path, offset)
    return tensor
