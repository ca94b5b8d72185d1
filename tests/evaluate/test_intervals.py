import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from burnish.evaluate import intervals
from burnish.evaluate.intervals import Interval, ratio_interval

RESAMPLES = 400


def mean_interval(values, resamples=RESAMPLES, seed=0, units=None):
    return ratio_interval(np.asarray(values, float), np.ones(len(values)), resamples, seed, units)


def test_two_rows_have_the_interval_that_counting_by_hand_gives():
    # resampled means of (0, 1) are 0, 1/2, 1 with 1/4, 1/2, 1/4: each end has far more than 2.5 %; symmetric, so BCa corrects nothing
    assert mean_interval([0, 1]) == Interval(0.5, 0.0, 1.0)


def test_the_value_is_the_ratio_of_sums_and_not_the_mean_of_ratios():
    found = ratio_interval(np.array([10.0, 1.0, 4.0, 3.0]), np.array([10, 2, 3, 5]), RESAMPLES, 0)
    assert found.value == pytest.approx(18 / 20)
    assert found.low < 18 / 20 < found.high


def test_a_resample_holds_the_amount_and_the_weight_of_the_same_rows():
    weights = np.random.default_rng(8).integers(1, 100, 60)
    found = ratio_interval(2 * weights + np.tile([-0.1, 0.1], 30), weights, RESAMPLES, 0)
    assert 0 < found.high - found.low < 0.01  # drawn apart, the weights alone would move the ratio by a tenth


def test_a_mean_of_many_has_the_width_of_the_normal_law():
    values = np.random.default_rng(1).normal(3, 2, 2000)
    found = mean_interval(values, 4000)
    expected = 1.96 * values.std(ddof=1) / np.sqrt(2000)
    # quantiles of 4000 resamples at 2.5 % lie within about 3 % of the half-width (one standard error)
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.08)


def test_the_interval_of_a_skewed_mean_is_scipys_bca():
    values = np.random.default_rng(2).exponential(1, 30)
    reference = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(5)).confidence_interval
    found = mean_interval(values, 20_000)
    # two Monte Carlo draws of 20 000: an end moves by about 1 % of the width
    width = reference.high - reference.low
    assert found.low == pytest.approx(reference.low, abs=0.04 * width)
    assert found.high == pytest.approx(reference.high, abs=0.04 * width)
    assert found.high - found.value > found.value - found.low


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    covered = 0
    for repeat in range(200):
        tokens = rng.integers(1, 12, 40)
        gain = rng.normal(-0.3, 0.5, 40) * tokens + rng.normal(0, 1, 40)  # loss of tuned - base; per token it is -0.3 in truth
        found = ratio_interval(gain, tokens, RESAMPLES, repeat)
        covered += found.low <= -0.3 <= found.high
    assert 0.90 <= covered / 200 <= 0.99


def test_several_wordings_of_one_fact_are_not_taken_for_several_facts():
    values = np.random.default_rng(4).normal(0, 1, 50)
    once = mean_interval(values)
    four_times = mean_interval(np.tile(values, 4), units=list(range(50)) * 4)
    assert four_times.low == pytest.approx(once.low)
    assert four_times.high == pytest.approx(once.high)
    blind = mean_interval(np.tile(values, 4))
    assert blind.high - blind.low < 0.65 * (once.high - once.low)  # half, up to the noise of the resamples


def test_rows_of_one_unit_need_not_stand_together():
    values, units = np.array([1.0, 5.0, 2.0, 9.0, 4.0, 7.0]), ["a", "b", "a", "c", "b", "c"]
    order = [0, 2, 1, 4, 3, 5]
    assert mean_interval(values, units=units) == mean_interval(values[order], units=[units[at] for at in order])


@pytest.mark.parametrize("amounts", [[0.0] * 7, [1.0] * 7, [0.1] * 7, [2.5]])
def test_rows_that_all_agree_have_no_width_and_no_warning(amounts):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = mean_interval(amounts)
    assert (found.value, found.low, found.high) == pytest.approx((amounts[0],) * 3)
    assert found.low == found.high


def test_rounding_gives_no_width():
    weights = np.arange(1, 30)
    found = ratio_interval(0.1 * weights, weights, RESAMPLES, 0)
    assert found.low == found.high == pytest.approx(0.1)


def test_the_seed_alone_decides():
    values = np.random.default_rng(6).normal(0, 1, 40)
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)


@pytest.mark.parametrize(
    ("low", "high", "clear"), [(0.1, 0.2, True), (-0.2, -0.1, True), (-0.1, 0.1, False), (0.0, 0.1, False), (0, 0, False)]
)
def test_clear_of_zero_means_that_zero_is_not_inside(low, high, clear):
    assert Interval((low + high) / 2, low, high).clear_of_zero is clear


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 1e-9, 1.0, 300.0]), st.sampled_from([1, 3, 1000])), min_size=1, max_size=12))
def test_an_interval_is_finite_and_ordered_whatever_the_rows(rows):
    amounts, weights = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ratio_interval(amounts, weights, 100, 0)
    assert np.isfinite([found.value, found.low, found.high]).all()
    assert found.low <= found.high


def test_percentiles_of_the_same_draw_are_taken_where_bca_is_not_defined(monkeypatch):
    def undefined(data, statistic, *, method, **rest):
        result = stats_bootstrap(data, statistic, method=method, **rest)
        if method == "BCa":
            result.confidence_interval = type(result.confidence_interval)(np.nan, np.nan)
        return result

    stats_bootstrap = stats.bootstrap
    monkeypatch.setattr(intervals.stats, "bootstrap", undefined)
    values = np.random.default_rng(7).exponential(1, 25)
    found = mean_interval(values, 2000)
    assert found.low < found.value < found.high
    reference = stats_bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(1)).confidence_interval
    width = reference.high - reference.low
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=0.1 * width)  # 2000 draws each
