"""Canaries: what we take from torch's private modules still does what we take it for; on a mesh that is only described."""

import inspect

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from burnish.parallel.imagined import can_imagine, imagined
from burnish.parallel.private import (
    FakeStore,
    FakeTensorMode,
    TorchDispatchMode,
    _dump_snapshot,
    _record_memory_history,
    compute_local_shape_and_global_offset,
    tree_leaves,
)


class Mesh:
    """As much of a `DeviceMesh` as the function asks for: how many ranks, and which of them this one is."""

    def __init__(self, size: int, rank: int) -> None:
        self._size, self._rank, self.ndim, self.shape = size, rank, 1, (size,)

    def size(self, dimension: int | None = None) -> int:
        return self._size

    def get_coordinate(self) -> list[int]:
        return [self._rank]

    def _sym_get_coordinate(self, dimension: int) -> int:
        return self._rank

    def _is_current_rank_part_of_mesh(self) -> bool:
        return True


@pytest.mark.parametrize(("rows", "ranks"), [(8, 2), (7, 2), (5, 4), (1, 3), (48, 1)])
def test_compute_local_shape_and_global_offset_cuts_rows_as_torch_chunk_does(rows, ranks):
    chunks = torch.arange(rows).chunk(ranks)
    for rank in range(ranks):
        shape, offset = compute_local_shape_and_global_offset(torch.Size((rows, 3)), Mesh(ranks, rank), (Shard(0),))
        mine = chunks[rank] if rank < len(chunks) else torch.arange(0)
        assert tuple(shape) == (len(mine), 3)
        if len(mine):
            assert tuple(offset) == (int(mine[0]), 0)


def test_compute_local_shape_and_global_offset_gives_all_rows_of_what_is_replicated():
    assert [tuple(part) for part in compute_local_shape_and_global_offset(torch.Size((8, 3)), Mesh(2, 1), (Replicate(),))] == [
        (8, 3),
        (0, 0),
    ]


def test_under_a_FakeTensorMode_tensors_have_shapes_and_no_bytes():
    with FakeTensorMode():
        product = torch.empty(1 << 20, 1 << 20) @ torch.empty(1 << 20, 3)  # four terabytes
    assert tuple(product.shape) == (1 << 20, 3)
    assert product.device.type == "cpu"


def test_ranks_over_a_FakeStore_return_at_once_and_leave_nothing_behind():
    assert isinstance(FakeStore(), torch.distributed.Store)
    with imagined(4) as world:
        assert (world.rank, world.size, world.mesh.size()) == (0, 4, 4)
        assert not can_imagine()
        out = torch.zeros(8)
        torch.distributed.all_gather_into_tensor(out, torch.ones(2))  # returns, though there is nobody
        with pytest.raises(AssertionError, match="has ranks already"), imagined(2):
            pass
    assert can_imagine()
    with imagined(1) as world:
        assert (world.size, world.mesh) == (1, None)


def test_a_TorchDispatchMode_sees_every_operation_of_forward_and_backward():
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    names: list[str] = []
    x = torch.ones(2, 3, requires_grad=True)
    with Seen():
        (x @ torch.ones(3, 4)).sum().backward()
    assert names.count("mm") == 2
    assert "sum" in names


def test_tree_leaves_gives_the_tensors_of_any_nest_in_order():
    one, two, three = torch.ones(1), torch.ones(2), torch.ones(3)
    leaves = tree_leaves({"a": [one, (two, None)], "b": three})
    assert [leaf for leaf in leaves if leaf is not None] == [one, two, three]


def test_the_record_memory_history_takes_a_number_of_entries_and_none_to_stop():
    assert "enabled" in inspect.signature(_record_memory_history).parameters
    assert "max_entries" in inspect.signature(torch.cuda.memory._record_memory_history_impl).parameters


def test_the_dump_snapshot_takes_the_name_of_a_file():
    assert next(iter(inspect.signature(_dump_snapshot).parameters)) == "filename"
