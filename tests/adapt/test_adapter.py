"""LoRA and DoRA are what the papers and PEFT say they are, at every format, whatever the cache of d and the recomputation do."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from burnish.adapt import adapter as adapter_module
from burnish.adapt.adapter import Adapter, dora_gain, plain_forward
from burnish.adapt.attach import MAGNITUDE
from burnish.model import linear
from tests.layers import KINDS, a_linear, an_adapter, dense, inputs, put, relative, results

FORMAT = pytest.mark.parametrize("name", KINDS)
METHOD = pytest.mark.parametrize("method", MAGNITUDE)
BIAS = pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)


# --- law 1


@FORMAT
@METHOD
@BIAS
@DTYPE
def test_before_training_the_adapted_layer_is_the_base_bit_for_bit(name, method, bias, dtype):
    base = a_linear(name, dtype, bias=bias)
    adapter, x = an_adapter(base, method, trained=False), inputs(dtype, 5, 128)
    assert torch.equal(adapter(x), base(x))  # B = 0 adds zeros, and ‖W‖ / ‖W‖ is 1 exactly: the same square root of the same number
    assert torch.equal(adapter(x), base(x))


@FORMAT
@METHOD
def test_switched_off_the_adapter_gives_the_base_bit_for_bit(name, method):
    base = a_linear(name, bias=True)
    adapter, x = an_adapter(base, method), inputs(torch.float32, 5, 128)
    assert not torch.allclose(adapter(x), base(x))
    adapter.switch.on = False
    assert torch.equal(adapter(x), base(x))


# --- against the layer as the paper writes it


@FORMAT
@METHOD
@BIAS
def test_in_float64_it_equals_the_plain_layer(name, method, bias):
    adapter = an_adapter(a_linear(name, torch.float64, bias=bias), method)
    x, g = inputs(torch.float64, 2, 3, 128), inputs(torch.float64, 2, 3, 48, seed=4)
    expected = results(adapter, lambda x: plain_forward(adapter, x), x, g)
    for _ in range(2):  # the second time d is kept, not found
        for part, value in results(adapter, adapter, x, g).items():
            assert relative(value, expected[part]) < 1e-10, part


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 300])
def test_it_equals_the_plain_layer_for_any_number_of_tokens(tokens, monkeypatch):
    monkeypatch.setitem(adapter_module.PRODUCT_BYTES, "cpu", 128 * 48 * 8)
    adapter = an_adapter(a_linear("nf4", torch.float64, bias=True), "dora")
    x, g = inputs(torch.float64, tokens, 128), inputs(torch.float64, tokens, 48, seed=4)
    expected = results(adapter, lambda x: plain_forward(adapter, x), x, g)
    for part, value in results(adapter, adapter, x, g).items():
        assert relative(value, expected[part]) < 1e-10, part


@METHOD
@BIAS
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_are_those_of_finite_differences_with_the_norm_held_fixed(method, bias, dropout):
    adapter = an_adapter(a_linear("nf4", torch.float64, width=64, out=6, bias=bias), method, rank=3, dropout=dropout)
    x = inputs(torch.float64, 3, 64).requires_grad_()
    adapter(x)
    norm = None if adapter.m is None else (adapter.m / adapter.d).detach()
    parts = [parameter for parameter in (adapter.a, adapter.b, adapter.m) if parameter is not None]

    def loss(x: Tensor, *values: Tensor) -> Tensor:
        for parameter, value in zip(parts, values, strict=True):
            parameter.data = value.detach()
        if norm is not None:
            adapter.d, adapter.stamp = adapter.m.detach() / norm, adapter.switch.step
        torch.manual_seed(5)
        return (adapter(x).sin() * torch.arange(6)).sum()

    found = torch.autograd.grad(loss(x, *parts), [x, *parts])
    step = 1e-6
    for number, (tensor, gradient) in enumerate(zip([x, *parts], found, strict=True)):
        direction = inputs(torch.float64, *tensor.shape, seed=number)
        values = [value.detach().clone() for value in (x, *parts)]
        up, down = ([*values[:number], values[number] + sign * step * direction, *values[number + 1 :]] for sign in (1, -1))
        slope = (loss(*up) - loss(*down)).item() / (2 * step)
        loss(*values)
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-6, abs=1e-6)


@FORMAT
@METHOD
def test_inputs_without_gradient_strided_inputs_and_no_inputs_are_served(name, method):
    adapter = an_adapter(a_linear(name, torch.float64, bias=True), method)
    strided = inputs(torch.float64, 128, 5, 2).permute(2, 1, 0)
    torch.testing.assert_close(adapter(strided), plain_forward(adapter, strided), rtol=1e-10, atol=1e-10)
    wanted = [parameter for parameter in (adapter.a, adapter.b, adapter.m) if parameter is not None]
    for found, right in zip(
        torch.autograd.grad(adapter(strided).sin().sum(), wanted),
        torch.autograd.grad(plain_forward(adapter, strided).sin().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)
    nothing = torch.zeros(1, 0, 128, dtype=torch.float64, requires_grad=True)
    assert all(not gradient.any() for gradient in torch.autograd.grad(adapter(nothing).sum(), [nothing, *wanted]))


@FORMAT
@METHOD
def test_small_tiles_equal_one_tile(name, method, monkeypatch):
    adapter = an_adapter(a_linear(name, torch.float64, bias=True), method)
    x, g = inputs(torch.float64, 5, 128), inputs(torch.float64, 5, 48)
    expected = results(adapter, adapter, x, g)
    monkeypatch.setitem(linear.TILE_BYTES, "cpu", 7 * 128 * 8)
    adapter.switch.advance()
    for part, value in results(adapter, adapter, x, g).items():
        assert relative(value, expected[part]) < 1e-12, part


# --- the norm


def _gains(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """d as the layer finds it, and from the norm of the dense float64 matrix."""
    adapter(inputs(adapter.base.dtype, 1, adapter.base.in_features))
    update = adapter.scaling * adapter.b.double() @ adapter.a.double()
    return adapter.d, adapter.m.double() / (dense(adapter.base).double() + update).norm(dim=1)


@FORMAT
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-5)], ids=str)
@pytest.mark.parametrize("size", [0.0, 0.01, 0.1, 1.0])
def test_d_is_within_its_bound_of_the_dense_norm(name, dtype, bound, size):
    worst = 0.0
    for seed in range(4):
        adapter = an_adapter(a_linear(name, dtype, width=512, out=96, seed=seed), "dora", rank=16, seed=seed + 10)
        with torch.no_grad():
            adapter.b.mul_(size * 10)  # from no update to one ten times the size of W
        found, right = _gains(adapter)
        worst = max(worst, ((found - right) / right).abs().max().item())
    assert worst < bound, f"{worst:.1e}"


def test_the_three_terms_of_the_norm_are_each_needed():
    adapter = an_adapter(a_linear("none", torch.float64), "dora")
    w, a, b, s = dense(adapter.base), adapter.a.detach(), adapter.b.detach(), adapter.scaling
    right = (w + s * b @ a).norm(dim=1)
    torch.testing.assert_close(
        1 / dora_gain(w.square().sum(1), w @ a.T, a @ a.T, b, torch.ones(48, dtype=torch.float64), s), right, rtol=1e-12, atol=0
    )
    for scale in ((2, 1), (1, 2)):  # the cross term or the square of the update doubled
        found = 1 / dora_gain(w.square().sum(1), scale[0] * (w @ a.T), scale[1] * (a @ a.T), b, torch.ones(48, dtype=torch.float64), s)
        assert relative(found, right) > 1e-3


def test_m_starts_at_the_norm_of_the_decoded_rows():
    adapter = an_adapter(a_linear("nf4"), "dora", trained=False)
    torch.testing.assert_close(adapter.m, dense(adapter.base).norm(dim=1), rtol=1e-6, atol=0)


@FORMAT
@DTYPE
def test_a_zero_row_of_w_and_a_magnitude_of_zero_give_zeros_and_no_nan(name, dtype):
    base = a_linear(name, dtype)
    rows = inputs(torch.float32, 48, 128)
    rows[2] = 0
    put(base, rows)
    adapter = an_adapter(base, "dora")
    with torch.no_grad():
        adapter.b[2] = 0
        adapter.m[5] = 0
        adapter.m[2] = 0.5
    adapter.switch.advance()
    found = results(adapter, adapter, inputs(dtype, 4, 128), inputs(dtype, 4, 48))
    assert all(value.isfinite().all() for value in found.values())
    assert not found["y"][:, [2, 5]].any()
    assert found["y"][:, 3].any()


# --- one d for one step


@pytest.fixture
def refreshes(monkeypatch) -> list[Adapter]:
    """The adapters whose d was found, each time that it was."""
    seen: list[Adapter] = []
    original = Adapter.refresh
    monkeypatch.setattr(Adapter, "refresh", lambda self: seen.append(self) or original(self))
    return seen


@pytest.mark.parametrize("recompute", [False, True])
def test_d_is_found_once_in_a_step_of_many_micro_batches(refreshes, recompute):
    adapter = an_adapter(a_linear("nf4"), "dora")
    for step in range(1, 4):
        for micro in range(3):
            x = inputs(torch.float32, 4, 128, seed=micro).requires_grad_()
            y = checkpoint(adapter, x, use_reentrant=False) if recompute else adapter(x)
            y.sum().backward()
        assert len(refreshes) == step
        adapter.switch.advance()


def test_lora_never_looks_for_a_norm(refreshes):
    adapter = an_adapter(a_linear("nf4"), "lora")
    adapter(inputs(torch.float32, 4, 128)).sum().backward()
    assert refreshes == []


def test_d_is_stale_until_the_switch_is_advanced_and_new_after_it():
    adapter, x = an_adapter(a_linear("nf4", torch.float64), "dora"), inputs(torch.float64, 4, 128)
    before = adapter(x)
    with torch.no_grad():
        adapter.m.mul_(2)
    torch.testing.assert_close(adapter(x), before, rtol=0, atol=0)  # this is what forgetting `advance` does
    adapter.switch.advance()
    torch.testing.assert_close(adapter(x), 2 * before, rtol=1e-12, atol=0)


def test_a_backward_pass_uses_the_d_of_its_own_forward_pass():
    adapter = an_adapter(a_linear("nf4", torch.float64), "dora")
    x, g = inputs(torch.float64, 4, 128).requires_grad_(), inputs(torch.float64, 4, 48)
    (expected,) = torch.autograd.grad(adapter(x), x, g)
    y = adapter(x)
    m = adapter.m.detach().clone()
    with torch.no_grad():
        adapter.m.data = m * 3
    adapter.switch.advance()
    adapter(x.detach())
    assert torch.equal(torch.autograd.grad(y, x, g)[0], expected)


@FORMAT
@METHOD
@DTYPE
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_changes_no_bit_of_a_result(name, method, dtype, dropout):
    """The pass that finds d, the passes that use it, and their recomputation do the same arithmetic; dropout draws the same mask."""
    adapter = an_adapter(a_linear(name, dtype, bias=True), method, dropout=dropout).train()
    x, g = inputs(dtype, 6, 128), inputs(dtype, 6, 48)
    runs = []
    for forward in (adapter, lambda x: checkpoint(adapter, x, use_reentrant=False)):
        for _ in range(2):
            torch.manual_seed(11)
            runs.append(results(adapter, forward, x, g))
        adapter.switch.advance()
    for other in runs[1:]:
        assert all(torch.equal(other[part], runs[0][part]) for part in other)


@FORMAT
@METHOD
def test_what_is_kept_for_the_backward_pass_is_x_ax_the_adapter_and_y_for_m(name, method):
    adapter = an_adapter(a_linear(name), method)
    x = inputs(torch.float32, 6, 128).requires_grad_()
    adapter(x)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        adapter(x)
    expected = [(6, 128), (6, 8), (8, 128), (48, 8)] + ([(48,), (6, 48)] if method == "dora" else [])
    assert sorted(tuple(tensor.shape) for tensor in kept) == sorted(expected)


@METHOD
@DTYPE
def test_gradients_lie_as_their_parameters_do_and_are_not_copied_once_more(method, dtype):
    adapter = an_adapter(a_linear("nf4", dtype), method)
    trained = list(adapter.parameters(recurse=False))
    for gradient, parameter in zip(torch.autograd.grad(adapter(inputs(dtype, 6, 128)).sum(), trained), trained, strict=True):
        assert (gradient.stride(), gradient.dtype) == (parameter.stride(), parameter.dtype)


# --- dropout


@METHOD
def test_dropout_touches_the_low_rank_branch_alone(method):
    """PEFT's DoRA drops the base branch too (it takes W x of the dropped x), so that with dropout the two differ."""
    base = a_linear("nf4", torch.float64, bias=True)
    adapter, x = an_adapter(base, method, dropout=0.5).train(), inputs(torch.float64, 6, 128)
    torch.manual_seed(5)
    y = adapter(x)
    torch.manual_seed(5)
    low = F.dropout(x, 0.5)
    gain = 1.0 if adapter.m is None else adapter.d
    expected = (x @ dense(base).T + adapter.scaling * low @ adapter.a.T @ adapter.b.T) * gain + base.bias
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    assert relative(adapter.eval()(x), y) > 1e-3


@METHOD
def test_with_dropout_the_gradients_are_those_of_the_written_out_layer(method):
    base = a_linear("nf4", torch.float64, bias=True)
    adapter, x, g = an_adapter(base, method, dropout=0.5).train(), inputs(torch.float64, 6, 128), inputs(torch.float64, 6, 48)

    def written_out(x: Tensor) -> Tensor:
        gain = 1.0 if adapter.m is None else adapter.m * (adapter.d / adapter.m).detach()
        return (x @ dense(base).T + adapter.scaling * F.dropout(x, 0.5) @ adapter.a.T @ adapter.b.T) * gain + base.bias

    torch.manual_seed(5)
    found = results(adapter, adapter, x, g)
    torch.manual_seed(5)
    for part, value in results(adapter, written_out, x, g).items():
        assert relative(found[part], value) < 1e-10, part


# --- precision of what is trained


def test_magnitudes_move_in_fp32_where_they_would_stand_still_in_bf16():
    adapter = an_adapter(a_linear("nf4", torch.bfloat16), "dora", trained=False)
    with torch.no_grad():
        adapter.m.clamp_min_(0.5)  # a usual size: bf16 has no number between 0.5 and 0.5039
    start = adapter.m.detach().clone()
    coarse = nn.Parameter(start.bfloat16())
    optimizer = torch.optim.AdamW([*(p for p in adapter.parameters() if p.requires_grad), coarse], lr=2e-4, weight_decay=0.0)
    for step in range(3):
        optimizer.zero_grad()
        adapter(inputs(torch.bfloat16, 16, 128, seed=step)).float().square().mean().backward()
        coarse.grad = adapter.m.grad.bfloat16()
        optimizer.step()
        adapter.switch.advance()
    assert adapter.m.dtype == torch.float32
    assert (adapter.m != start).all()
    assert torch.equal(coarse, start.bfloat16())
