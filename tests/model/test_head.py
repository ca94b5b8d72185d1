"""The head's loss is cross-entropy, in value and gradient, in every dtype and however it is cut."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from burnish.model import head as heads
from burnish.model.head import head_loss, token_losses

WIDTH, VOCABULARY, COUNT = 32, 200, 37
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
BIAS = pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
CAP = pytest.mark.parametrize("cap", [None, 5.0], ids=["plain", "capped"])
# the value: a sum of 37 in fp32 or float64; the gradient in bf16: 8 bits for each entry, after the head's rounded logits
VALUE = {torch.float32: 1e-6, torch.bfloat16: 1e-5, torch.float64: 1e-12}
GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}


def a_head(dtype: torch.dtype, bias: bool = False, count: int = COUNT) -> tuple[Tensor, nn.Linear, Tensor]:
    """Hidden states, a frozen head, targets."""
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias).requires_grad_(False)
    head.weight.copy_(torch.randn(VOCABULARY, WIDTH, generator=generator) * 0.5)
    if bias:
        head.bias.copy_(torch.randn(VOCABULARY, generator=generator))
    hidden = torch.randn(count, WIDTH, generator=generator).to(dtype).requires_grad_()
    return hidden, head.to(dtype), torch.randint(VOCABULARY, (count,), generator=generator)


def reference(hidden: Tensor, head: nn.Linear, targets: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """Value and gradient in float64, from logits as the head's dtype rounds them."""
    hidden = hidden.detach().clone().requires_grad_()
    logits = F.linear(hidden, head.weight, head.bias).double()
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return loss.detach(), torch.autograd.grad(loss, hidden)[0].double()


@DTYPE
@BIAS
@CAP
@pytest.mark.parametrize("rows", [None, 1, 10, 37], ids=lambda rows: f"chunks of {rows}")
def test_value_and_gradient_equal_cross_entropy(dtype, bias, cap, rows, monkeypatch):
    hidden, head, targets = a_head(dtype, bias)
    if rows is not None:
        monkeypatch.setitem(heads.LOGIT_BYTES, "cpu", rows * 4 * VOCABULARY)
    loss = head_loss(head, hidden, targets, cap)
    (gradient,) = torch.autograd.grad(loss, hidden)
    value, expected = reference(hidden, head, targets, cap)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(value.item(), rel=VALUE[dtype])
    assert (gradient.double() - expected).norm() <= GRADIENT[dtype] * expected.norm()


@DTYPE
@BIAS
@CAP
@pytest.mark.parametrize("rows", [None, 10], ids=lambda rows: f"chunks of {rows}")
def test_the_losses_of_tokens_are_their_cross_entropies_and_add_up(dtype, bias, cap, rows, monkeypatch):
    hidden, head, targets = a_head(dtype, bias)
    if rows is not None:
        monkeypatch.setitem(heads.LOGIT_BYTES, "cpu", rows * 4 * VOCABULARY)
    losses = token_losses(head, hidden, targets, cap)
    logits = F.linear(hidden, head.weight, head.bias).double()
    capped = logits if cap is None else torch.tanh(logits / cap) * cap
    torch.testing.assert_close(losses.double(), F.cross_entropy(capped, targets, reduction="none"), rtol=1e-5, atol=1e-5)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not losses.requires_grad
    assert losses.sum().item() == pytest.approx(head_loss(head, hidden, targets, cap).item(), rel=1e-5)


def test_torchs_own_bf16_sum_is_wrong_where_ours_is_right():
    hidden, head, targets = a_head(torch.bfloat16, count=512)
    exact = reference(hidden, head, targets, None)[0].item()
    torchs = F.linear_cross_entropy(hidden, head.weight, targets, reduction="sum").item()
    assert abs(torchs - exact) > 1e-3 * exact, "torch now sums in fp32: `head_loss` needs no second pass any more"
    assert head_loss(head, hidden, targets).item() == pytest.approx(exact, rel=1e-5)


@DTYPE
@CAP
def test_without_a_target_the_loss_is_zero_with_a_gradient_of_zeros(dtype, cap):
    hidden, head, targets = a_head(dtype)
    whole = hidden.detach().clone().requires_grad_()
    loss = head_loss(head, whole[:0], targets[:0], cap)
    assert loss.item() == 0
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    loss.backward()
    assert whole.grad is not None
    assert not whole.grad.any()
    assert token_losses(head, whole[:0], targets[:0], cap).shape == (0,)


def test_where_the_logits_are_too_large_torch_is_asked_for_chunks_of_our_size(monkeypatch):
    hidden, head, targets = a_head(torch.float32)
    asked, original = [], F.linear_cross_entropy
    monkeypatch.setattr(F, "linear_cross_entropy", lambda *args, **kwargs: asked.append(kwargs["options"]) or original(*args, **kwargs))
    for rows in (COUNT, COUNT - 1, 10):
        monkeypatch.setitem(heads.LOGIT_BYTES, "cpu", rows * 4 * VOCABULARY)
        head_loss(head, hidden, targets)
    assert asked[0] is None
    assert [options.batch_chunk_size for options in asked[1:]] == [COUNT - 1, 10]


def test_capped_logits_never_exist_for_all_positions_at_once(monkeypatch):

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made.extend(value.numel() for value in tree_leaves(result) if isinstance(value, Tensor))
            return result

    hidden, head, targets = a_head(torch.float32)
    largest = []
    for rows in (COUNT, 10):
        monkeypatch.setitem(heads.LOGIT_BYTES, "cpu", rows * 4 * VOCABULARY)
        made: list[int] = []
        with Made():
            head_loss(head, hidden, targets, 5.0).backward()
        largest.append(max(made))
    assert largest == [COUNT * VOCABULARY, WIDTH * VOCABULARY]  # in chunks the head itself is the largest


def test_the_fall_back_to_the_unchunked_path_is_an_error_and_no_warning(monkeypatch):
    import warnings

    hidden, head, targets = a_head(torch.float32)
    monkeypatch.setattr(F, "linear_cross_entropy", lambda *_, **__: warnings.warn("falling back to the unchunked path", stacklevel=1))
    with pytest.raises(UserWarning, match="falling back"):
        head_loss(head, hidden, targets)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("bias", [False, True])
def test_the_loss_of_no_target_reaches_a_trained_head_with_zeros(bias, softcap):
    """A rank without a token to learn must run the backward pass that the others run."""
    head = nn.Linear(16, 40, bias=bias)
    head_loss(head, torch.randn(0, 16), torch.zeros(0, dtype=torch.int64), softcap).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in head.parameters())


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_head_that_is_held_in_fp32_is_rounded_to_the_compute_dtype_and_its_gradient_is_fp32(softcap):
    torch.manual_seed(0)
    master, hidden, targets = nn.Linear(16, 40, bias=True), torch.randn(9, 16).bfloat16(), torch.arange(9)
    rounded = nn.Linear(16, 40, bias=True).bfloat16()
    rounded.load_state_dict({name: value.bfloat16() for name, value in master.state_dict().items()})
    losses = [head_loss(head, hidden, targets, softcap) for head in (master, rounded)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for mine, other in zip(master.parameters(), rounded.parameters(), strict=True):
        assert mine.grad.dtype == torch.float32
        assert torch.equal(mine.grad, other.grad.float())
