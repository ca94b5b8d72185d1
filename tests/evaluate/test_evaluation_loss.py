import numpy as np
import pytest
import torch
from torch.nn import functional as F

from burnish.data.tokens import open_tokens, write_tokens
from burnish.evaluate.loss import losses
from burnish.model.attention import SEGMENTS
from tests.tiny import FAMILIES, built_from, tiny_folder, tiny_network

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tokens(tmp_path):
    rng = np.random.default_rng(0)
    samples = []
    for number, length in enumerate((9, 30, 4, 17, 17, 25)):
        ids = rng.integers(2, 320, length)
        mask = (rng.random(length) < 0.5).astype(int)
        mask[0], mask[-1] = 0, 1
        samples.append((ids.tolist(), mask.tolist(), (number,)))
    write_tokens(tmp_path / "tokens", samples)
    return open_tokens(tmp_path / "tokens")


@pytest.mark.parametrize("family", FAMILIES)
def test_each_sample_has_the_loss_that_transformers_gives_it_alone(family, tokens, tmp_path):
    built = built_from(tiny_folder(tmp_path / "model", family), {"format": "none"})
    sums, counts = losses(built, tokens, 64, 1)
    original = tiny_network(family)
    for at in range(len(tokens)):
        ids, mask = (torch.tensor(part.astype(np.int64)) for part in tokens.sample(at))
        with torch.no_grad():
            logits = original(ids[None]).logits[0].double()
        expected = F.cross_entropy(logits[:-1][mask[1:] > 0], ids[1:][mask[1:] > 0], reduction="sum")
        assert counts[at] == mask.sum()
        assert sums[at] == pytest.approx(float(expected), rel=2e-5)  # fp32, whose sums have another order here


def test_losses_do_not_depend_on_the_batch(tokens, tmp_path):
    built = built_from(tiny_folder(tmp_path / "model"))
    alone, counts = losses(built, tokens, 30, 1)
    together, same = losses(built, tokens, 64, 4)
    np.testing.assert_allclose(together, alone, rtol=2e-5)  # fp32: products of another height are summed in another order
    np.testing.assert_array_equal(counts, same)
    np.testing.assert_array_equal(counts, tokens.supervised)
    assert sums_are(alone, np.float64)
    assert sums_are(counts, np.int64)


def sums_are(values, dtype):
    return values.dtype == dtype and values.shape == (6,)


def test_the_model_is_as_it_was_and_progress_counts_every_sample(tokens, tmp_path):
    built = built_from(tiny_folder(tmp_path / "model"), adapt={"dropout": 0.5})
    attention = built.model.config._attn_implementation
    told: list[int] = []
    within: list[str] = []

    def advance(samples):
        told.append(samples)
        within.append(built.model.config._attn_implementation)

    expected, _ = losses(built, tokens, 64, 1)
    built.model.train()
    again, _ = losses(built, tokens, 64, 1, advance)
    np.testing.assert_array_equal(again, expected)
    assert built.model.training
    assert built.model.config._attn_implementation == attention
    assert set(within) == {SEGMENTS} != {attention}, "attention ran over the full square of a batch"
    assert sum(told) == len(tokens)
