"""Every private function of torch that is used anywhere, each with a canary test in `tests/parallel/test_private.py`."""

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.cuda.memory import _dump_snapshot, _record_memory_history
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "FakeStore",
    "FakeTensorMode",
    "TorchDispatchMode",
    "_dump_snapshot",
    "_record_memory_history",
    "compute_local_shape_and_global_offset",
    "tree_leaves",
]
