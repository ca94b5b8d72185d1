"""burnish: documents in, a checked model to serve out. Read `pipeline.py` first.

The public names below are all that is promised; each is imported when it is first used, so that `import burnish` costs nothing.
"""

import os
import platform
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_PUBLIC = {
    "load_config": "burnish.toml",
    "prepare": "burnish.pipeline",
    "plan": "burnish.pipeline",
    "finetune": "burnish.pipeline",
    "evaluate": "burnish.pipeline",
    "export": "burnish.pipeline",
    "load": "burnish.pipeline",
}
__all__ = list(_PUBLIC)
__version__ = "0.1.0"


if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} and "microsoft" not in platform.release().lower():
    # GPU memory in segments that grow, so that what is freed fits what is asked for next. Here, since torch reads it once, at any module's
    # first use of a GPU. Not under WSL2, where drivers before R615 fail at the first allocation (pytorch/pytorch#192330).
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'burnish' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


class _Package(ModuleType):
    """`plan`, `evaluate`, `export` and `load` are also folders. Importing something of them must not displace the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
