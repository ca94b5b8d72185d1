"""What waits in host memory, and what is recomputed: results are equal bit for bit to those without."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.export.merge import merged_tensors
from burnish.model.network import packed
from burnish.model.offload import ALIGNED, HostBase, flat_bytes, pieces, share_bytes
from burnish.plan.trace import worst_batch
from burnish.skeleton import Built
from tests.layers import KINDS, a_linear
from tests.plan.test_trace import batch_of_lengths
from tests.tiny import FAMILIES, a_plan, built_from, tiny_folder, train_a_little

LAYERS = 5
WAYS: dict[str, dict[str, Any]] = {
    "every 2nd layer": {"checkpointing": True, "checkpoint_every": 2},
    "every 3rd layer, kept on the host": {"checkpointing": True, "checkpoint_every": 3, "offload_activations": True},
    "every layer, kept on the host": {"checkpointing": True, "offload_activations": True},
    "the base on the host": {"offload_base": True},
    "the base on the host and every layer recomputed": {"offload_base": True, "checkpointing": True},
    "all of it": {"offload_base": True, "checkpointing": True, "checkpoint_every": 2, "offload_activations": True},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("offload")
    return {family: tiny_folder(root / family, family, num_hidden_layers=LAYERS) for family in FAMILIES}


def results(built: Built, rounds: int = 2) -> dict[str, torch.Tensor]:
    """Losses and gradients of some micro-batches one after the other, with dropout."""
    torch.manual_seed(5)
    built.model.train()
    found = {}
    with packed(built.model):
        for number in range(rounds):
            loss = built.model.loss_of(batch_of_lengths((20, 30, 14)))  # pyright: ignore[reportCallIssue]
            loss.backward()
            found[f"loss {number}"] = loss.detach()
    return found | {name: parameter.grad for name, parameter in built.adapters.trainable().items()}  # pyright: ignore


def built_so(folder: Path, plan: dict[str, Any], model: dict[str, Any] | None = None) -> Built:
    built = built_from(folder, model, {"dropout": 0.1}, a_plan(**plan))
    train_a_little(built)
    return built


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_losses_and_gradients_are_bit_for_bit_those_without(folders, family, way):
    expected, found = results(built_so(folders[family], {})), results(built_so(folders[family], WAYS[way]))
    for name, right in expected.items():
        assert torch.equal(found[name], right), name


@pytest.mark.parametrize(("form", "dtype"), [*((form, "bf16") for form in KINDS), ("nf4", "fp32"), ("nf4", "fp16")])
def test_a_base_on_the_host_gives_the_same_in_every_format(folders, form, dtype):
    plain = results(built_so(folders["llama"], {"dtype": dtype}, {"format": form}), 1)
    moved = results(built_so(folders["llama"], {"dtype": dtype, "offload_base": True}, {"format": form}), 1)
    for name, right in plain.items():
        assert torch.equal(moved[name], right), name


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("form", KINDS)
def test_shares_of_all_ranks_one_behind_the_other_are_the_layer_and_no_two_places_overlap(form, ranks):
    """What a gather does, without processes; 50 and 7 rows, which few numbers of ranks divide."""
    layer = torch.nn.ModuleList([a_linear(form, out=50), a_linear(form, out=7, seed=1)])
    found = pieces(layer, ranks)
    flat = torch.empty(flat_bytes(found), dtype=torch.uint8)
    shares = [torch.empty(share_bytes(found), dtype=torch.uint8) for _ in range(ranks)]
    for piece in found:
        tensor = getattr(piece.linear, piece.name)
        cut = torch.chunk(tensor, ranks)
        for rank, share in enumerate(shares):
            mine = piece.mine(share, rank)
            assert mine.shape == (cut[rank].shape if rank < len(cut) else (0, *tensor.shape[1:])), "not as FSDP2 cuts"
            mine.copy_(cut[rank] if rank < len(cut) else tensor[:0])
    for piece in found:
        pairs = [piece.pair(share, flat) for share in shares]
        pairs[0][1].copy_(torch.cat([mine for mine, _ in pairs]))
    taken = [piece.pair(shares[0], flat) for piece in found]
    for side in (0, 1):
        starts = [(pair[side].storage_offset(), pair[side].storage_offset() + len(pair[side])) for pair in taken]
        assert all(end <= start and start % ALIGNED == 0 for (_, end), (start, _) in pairwise(starts))
    for piece in found:
        assert torch.equal(piece.inside(flat), getattr(piece.linear, piece.name)), piece.name


def host_of(built: Built) -> Any:
    """The one object that moves the layers, as the first of them knows it."""
    cells = [
        cell.cell_contents for hook in built.layers[0]._forward_pre_hooks.values() for cell in getattr(hook, "__closure__", None) or ()
    ]
    return next(content for content in cells if isinstance(content, HostBase))


def test_every_layer_computes_from_a_slot_and_comes_once_each_way(folders, monkeypatch):
    built = built_so(folders["llama"], {"offload_base": True})
    host = host_of(built)
    read: list[tuple[bool, ...]] = []
    linear = next(iter(built.linears.values()))
    real = type(linear).tiles

    def watched(self, gain=None, dtype=None):
        near = [tensor.untyped_storage().data_ptr() for tensor in self.near.values()]
        read.append(tuple(pointer in {slot.data_ptr() for slot in host.slots} for pointer in near))
        return real(self, gain, dtype)

    monkeypatch.setattr(type(linear), "tiles", watched)
    results(built, rounds=3)
    assert read
    assert all(inside and all(inside) for inside in read), "a layer was read from the host while it ran"
    # forward 5 layers, backward all but the two that are still there; then again all but the first two
    assert host.copies == 5 + 3 + 2 * (3 + 3)


def test_a_layers_slot_is_never_overwritten_while_the_layer_may_be_read(folders):
    """Whoever is sent for, the layer that was in the slot no longer points into it."""
    built = built_so(folders["llama"], {"offload_base": True})
    host = host_of(built)
    for number, ahead in [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (4, -1), (3, -1), (2, -1)]:
        host.bring(number, ahead)
        for layer, group in enumerate(host.taken):
            for piece in group:
                if piece.name in piece.linear.near:
                    assert host.inside[layer % 2] == layer
                    assert torch.equal(piece.linear.near[piece.name], getattr(piece.linear, piece.name))
        assert all(piece.name in piece.linear.near for piece in host.taken[number])


def test_trained_tensors_norms_and_embeddings_never_move(folders):
    built = built_so(folders["qwen2"], {"offload_base": True})
    moved = {id(getattr(piece.linear, piece.name)) for group in host_of(built).taken for piece in group}
    codes = {id(getattr(linear, name)) for linear in built.linears.values() for name in linear.names}
    assert moved == codes
    assert not moved & {id(parameter) for parameter in built.model.parameters() if parameter.requires_grad}


def test_a_model_whose_base_waits_on_the_host_generates_and_exports_the_same(folders):
    plain, moved = built_so(folders["llama"], {}), built_so(folders["llama"], {"offload_base": True})
    for built in (plain, moved):
        built.model.eval()  # no dropout
    prompt = torch.arange(2, 12)[None]
    one, other = (built.model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=1) for built in (plain, moved))
    assert torch.equal(one, other)
    for (name, slabs), (_, others) in zip(merged_tensors(plain), merged_tensors(moved), strict=True):
        assert torch.equal(torch.cat(list(slabs)), torch.cat(list(others))), name


def test_only_the_first_of_every_so_many_layers_is_recomputed(folders):
    built = built_so(folders["llama"], {"checkpointing": True, "checkpoint_every": 2})
    runs = dict.fromkeys(range(LAYERS), 0)

    def count(number: int) -> None:
        runs[number] += 1

    for number, layer in enumerate(built.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: count(number))
    results(built, 1)
    assert runs == {0: 2, 1: 1, 2: 2, 3: 1, 4: 2}


def test_what_waits_on_the_host_is_the_input_of_each_recomputed_layer_and_nothing_else(folders, monkeypatch):
    from burnish.model import network

    kept: list[torch.Size] = []
    real = network.to_host
    monkeypatch.setattr(network, "to_host", lambda tensor: (kept.append(tensor.shape), real(tensor))[1])
    built = built_so(folders["llama"], {"checkpointing": True, "offload_activations": True})
    built.model.train()
    with packed(built.model):
        built.model.loss_of(worst_batch(64, 1)).backward()  # pyright: ignore[reportCallIssue]
    assert [shape for shape in kept if shape.numel()] == [torch.Size((1, 65, 128))] * LAYERS
