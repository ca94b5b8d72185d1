"""Quantized embeddings and head: the network with its decoded matrices put in, at the memory of a tile."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from burnish.adapt.disk import about_adapter, load_adapter, save_adapter
from burnish.config import AdaptConfig, ModelConfig
from burnish.errors import UserError
from burnish.evaluate.generate import generate
from burnish.export.merge import merged_tensors
from burnish.load.cache import cache_root
from burnish.model import head as heads
from burnish.model import linear
from burnish.model.ends import frozen_loss, frozen_losses
from burnish.model.network import packed
from tests.layers import a_linear, dense, inputs, relative
from tests.model.test_families import packed_batch
from tests.tiny import a_plan, asked, built_from, tiny_folder, train_a_little

ENDS = [name for name in ModelConfig.__dataclass_fields__["ends"].type.__args__ if name not in ("none", "stored")]
VOCABULARY, WIDTH, COUNT = 200, 64, 37


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Own matrices and a tied one; the tied model scales its embeddings and caps its logits."""
    root = tmp_path_factory.mktemp("ends")
    tied = {"final_logit_softcapping": 5.0, "tie_word_embeddings": True}
    return {"own": tiny_folder(root / "own", "qwen2"), "tied": tiny_folder(root / "tied", "gemma2", **tied)}


TIED = pytest.mark.parametrize("kind", ["own", "tied"])


def with_dense_ends(folder: Path, quantized: Any, **model: Any) -> Any:
    """The same model with dense matrices, the decoded ones."""
    plain = built_from(folder, {"format": "nf4"} | model)
    table, head = quantized.model.get_input_embeddings().table, quantized.model.get_output_embeddings()
    with torch.no_grad():
        plain.model.get_input_embeddings().weight.copy_(dense(table))
        plain.model.get_output_embeddings().weight.copy_(dense(head))
    train_a_little(plain)
    train_a_little(quantized)
    return plain


def step(built: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, each token's loss, gradients of one packed batch."""
    built.model.train()
    with packed(built.model):
        loss = built.model.loss_of(packed_batch())
        loss.backward()
        return loss.detach(), built.model.losses_of(packed_batch()), {name: p.grad for name, p in built.adapters.trainable().items()}


@pytest.mark.parametrize(("kind", "ends"), [*(("own", name) for name in ENDS), ("tied", "int8"), ("tied", "nf4")])
def test_the_model_is_the_one_with_decoded_matrices_put_in(folders, kind, ends):
    built = built_from(folders[kind], {"ends": ends})
    plain, ids = with_dense_ends(folders[kind], built), torch.arange(2, 40)[None]
    with torch.no_grad():
        assert torch.equal(built.model(ids).logits, plain.model(ids).logits)
    (loss, losses, gradients), (right, each, expected) = step(built), step(plain)
    # fp32: the softmax is summed tile by tile
    torch.testing.assert_close(loss, right, rtol=1e-6, atol=0)
    torch.testing.assert_close(losses, each, rtol=1e-5, atol=1e-5)
    for name in expected:
        assert relative(gradients[name], expected[name]) < 1e-5, name


def test_answers_are_those_of_the_decoded_matrices(folders):
    """With a cache and a padded batch, which only generation has."""
    built = built_from(folders["own"], {"ends": "int4"})
    plain = with_dense_ends(folders["own"], built)
    template: Any = SimpleNamespace(
        prompt=lambda text: [2 + ord(letter) % 200 for letter in text],
        stop_ids={1},
        tokenizer=SimpleNamespace(pad_token_id=1),
        decode=lambda ids: " ".join(map(str, ids)),
    )
    questions = ["where is it", "who", "and when does the last one leave"]
    answers = generate(built, template, questions, 8, 3)
    assert answers == generate(plain, template, questions, 8, 3)
    assert len(set(answers)) == 3


@TIED
@pytest.mark.parametrize("ends", ["int8", "nf4"])
def test_before_training_it_is_its_base_bit_for_bit(folders, kind, ends):
    built, ids = built_from(folders[kind], {"ends": ends}), torch.arange(2, 40)[None]
    with torch.no_grad():
        adapted = built.model(ids).logits
        built.adapters.switch.on = False
        assert torch.equal(built.model(ids).logits, adapted)


def test_a_tied_matrix_is_held_once(folders):
    built = built_from(folders["tied"], {"ends": "int8"})
    assert built.model.get_input_embeddings().table is built.model.get_output_embeddings()
    assert sum(name.endswith(".packed") and "layers" not in name for name, _ in built.model.named_parameters()) == 1


# --- the loss


def plain_loss(head: Any, hidden: Tensor, targets: Tensor, cap: float | None) -> Tensor:
    """The head decoded whole, all logits at once."""
    logits = F.linear(hidden, dense(head), head.bias)
    logits = logits.to(linear.wide(logits.dtype))
    return F.cross_entropy(logits if cap is None else torch.tanh(logits / cap) * cap, targets, reduction="none")


# sums of 37 in another order; in bf16 a weight of the softmax and each tile's share of the gradient are rounded to 8 bits
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("cap", [None, 5.0], ids=["plain", "capped"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(("rows", "positions"), [(200, 37), (7, 37), (64, 5)])
def test_loss_and_gradient_equal_cross_entropy_however_it_is_cut(dtype, cap, bias, rows, positions, monkeypatch):
    head = a_linear("int8", dtype, width=WIDTH, out=VOCABULARY, bias=bias)
    hidden = (inputs(dtype, COUNT, WIDTH) * 8).requires_grad_()
    targets = torch.randint(VOCABULARY, (COUNT,), generator=torch.Generator().manual_seed(0))
    expected = plain_loss(head, hidden, targets, cap)
    (right,) = torch.autograd.grad(expected.sum() * 3, hidden)
    monkeypatch.setitem(linear.TILE_BYTES, "cpu", rows * WIDTH * dtype.itemsize)
    monkeypatch.setitem(heads.LOGIT_BYTES, "cpu", positions * rows * 4)
    loss, losses = frozen_loss(head, hidden, targets, cap), frozen_losses(head, hidden, targets, cap)
    (gradient,) = torch.autograd.grad(loss * 3, hidden)
    assert losses.dtype == loss.dtype == linear.wide(dtype)
    assert not losses.requires_grad
    exact = min(CLOSE[dtype], 1e-5)  # logits are rounded alike, the rest is fp32
    torch.testing.assert_close(losses, expected.detach(), rtol=exact, atol=exact)
    torch.testing.assert_close(loss.detach(), expected.detach().sum(), rtol=exact, atol=exact)
    assert gradient.dtype == dtype
    assert (gradient.double() - right.double()).norm() <= CLOSE[dtype] * right.double().norm()


def test_logits_of_any_size_give_a_finite_loss():
    """The largest logit of later tiles exceeds that of earlier ones by more than exp can hold."""
    head = a_linear("int8", torch.float32, width=WIDTH, out=VOCABULARY)
    hidden = (inputs(torch.float32, 9, WIDTH) * 3000).requires_grad_()
    targets = torch.arange(9)
    loss = frozen_loss(head, hidden, targets)
    assert loss.item() == pytest.approx(plain_loss(head, hidden, targets, None).sum().item(), rel=1e-5)
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_without_a_target_the_loss_is_zero_with_a_gradient_of_zeros(dtype):
    head, hidden = a_linear("nf4", dtype, width=WIDTH, out=VOCABULARY), inputs(dtype, 3, WIDTH).requires_grad_()
    none = torch.zeros(0, dtype=torch.int64)
    loss = frozen_loss(head, hidden[:0], none)
    loss.backward()
    assert (loss.item(), loss.dtype) == (0, linear.wide(dtype))
    assert hidden.grad is not None
    assert not hidden.grad.any()
    assert frozen_losses(head, hidden[:0], none).shape == (0,)


def test_neither_the_dense_head_nor_all_logits_ever_exist(monkeypatch):
    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made.extend(value.numel() for value in tree_leaves(result) if isinstance(value, Tensor) and value.is_floating_point())
            return result

    head = a_linear("int8", torch.float32, width=WIDTH, out=VOCABULARY)
    hidden, targets = inputs(torch.float32, 90, WIDTH).requires_grad_(), torch.arange(90)
    monkeypatch.setitem(linear.TILE_BYTES, "cpu", 20 * WIDTH * 4)
    monkeypatch.setitem(heads.LOGIT_BYTES, "cpu", 10 * 20 * 4)
    made: list[int] = []
    with Made():
        frozen_loss(head, hidden, targets, 5.0).backward()
        frozen_losses(head, hidden.detach(), targets)
    assert max(made) == 90 * WIDTH < VOCABULARY * WIDTH, "the hidden states are the largest"


def test_only_the_rows_that_are_looked_up_are_decoded(folders, monkeypatch):
    built, decoded = built_from(folders["own"], {"ends": "nf4"}), []
    embeddings = built.model.get_input_embeddings()
    form = embeddings.table.form
    counted = replace(form, dequantize=lambda tensors, *rest: decoded.append(len(tensors["packed"])) or form.dequantize(tensors, *rest))
    monkeypatch.setattr(type(embeddings.table), "form", property(lambda self: counted))
    ids = torch.tensor([[5, 7, 5], [319, 0, 1]])
    rows = embeddings(ids)
    assert decoded == [6]
    monkeypatch.undo()
    assert torch.equal(rows, dense(embeddings.table)[ids])


# --- filling, keeping, writing


def test_with_a_quantized_base_they_lie_in_its_cache_and_another_format_has_another(folders):
    first = built_from(folders["tied"], {"ends": "int8", "cache": True})
    assert len(list((cache_root() / "quantized").glob("*/key.json"))) == 1
    again = built_from(folders["tied"], {"ends": "int8", "cache": True})
    for name, parameter in first.model.named_parameters():
        assert torch.equal(parameter, again.model.get_parameter(name)), name
    built_from(folders["tied"], {"ends": "nf4", "cache": True})
    assert len(list((cache_root() / "quantized").glob("*/key.json"))) == 2


def test_alone_they_keep_no_cache_of_a_dense_base(folders):
    built_from(folders["own"], {"format": "none", "ends": "int8", "cache": True})
    assert not (cache_root() / "quantized").exists()


@TIED
def test_what_is_merged_holds_them_decoded(folders, kind):
    built = built_from(folders[kind], {"ends": "int8"})
    merged = {name: torch.cat(list(slabs)) for name, slabs in merged_tensors(built)}
    assert torch.equal(merged["model.embed_tokens.weight"], dense(built.model.get_input_embeddings().table))
    assert ("lm_head.weight" in merged) == (kind == "own")


def test_a_head_in_the_file_of_a_tied_model_must_be_the_embeddings(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tiny_folder(tmp_path / "model", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        built_from(folder, {"ends": "int8"})


def test_an_adapter_remembers_them(folders, tmp_path):
    built, adapt = built_from(folders["own"], {"ends": "int8"}), AdaptConfig(rank=8, alpha=16.0)
    about = about_adapter(asked(folders["own"], {"ends": "int8"}), a_plan(), "f", {}, 64)
    save_adapter(built.adapters, adapt, tmp_path / "adapter", about)
    assert load_adapter(built.adapters, tmp_path / "adapter", "f")["ends"] == "int8"
    other = built_from(folders["own"])
    with pytest.raises(UserError, match=r"model.ends: 'int8' in the adapter, 'none' here"):
        load_adapter(other.adapters, tmp_path / "adapter", "f")


# --- refused


@pytest.mark.parametrize("also", ["embed_tokens", "lm_head"])
@TIED
def test_what_is_held_in_codes_is_not_trained(folders, kind, also):
    with pytest.raises(
        UserError, match=rf"adapt.also names (model\.)?{also}, and model.ends = 'int8' holds .* cannot be trained. Set model"
    ):
        built_from(folders[kind], {"ends": "int8"}, {"also": (also,)})


@pytest.mark.parametrize(
    ("model", "adapt", "message"),
    [
        (
            {"format": "none", "ends": "int8"},
            {"method": "full"},
            "trains embeddings and head too, and model.ends = 'int8' holds them in codes",
        ),
        ({"format": "none", "ends": "int8", "block": 256}, {}, "model.embed_tokens: its 128 inputs .* block of 256 .* or model.ends=none"),
    ],
)
def test_what_cannot_be_is_refused(folders, model, adapt, message):
    with pytest.raises(UserError, match=message):
        built_from(folders["own"], model, adapt)


def test_int4_has_no_blocks_of_256():
    with pytest.raises(ValueError, match=r"block = 256: ends = 'int4' has blocks of 32, 64 or 128"):
        ModelConfig(path="x", ends="int4", block=256)


def test_embeddings_that_do_more_than_look_up_are_refused(folders, monkeypatch):
    from transformers.models.qwen2 import modeling_qwen2

    class Odd(nn.Embedding): ...

    own = modeling_qwen2.Qwen2Model.__init__
    monkeypatch.setattr(
        modeling_qwen2.Qwen2Model, "__init__", lambda self, config: own(self, config) or setattr(self, "embed_tokens", Odd(320, 128))
    )
    with pytest.raises(UserError, match=r"model.ends = 'int8': embeddings and head of this model \(Odd and Linear\) do more"):
        built_from(folders["own"], {"ends": "int8"})
