"""95 % intervals by the bootstrap: what another draw of questions might have given."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.95
FEWEST = 6
"""Units below which nothing is said: even if all of five agree, a two-sided sign test gives p = 2 · 0.5⁵ = 6 %."""
_NUMBERS_AT_ONCE = 1 << 22  # resampled indices that exist at a time: 32 MiB


@dataclass(frozen=True)
class Interval:
    """A measured value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def clear_of_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def ratio_interval(amounts: np.ndarray, weights: np.ndarray, resamples: int, seed: int, units: Sequence[Any] | None = None) -> Interval:
    """The interval of Σ amounts / Σ weights over rows [S] that are drawn anew with replacement, amount and weight together.

    Every measure here is such a ratio: a mean has weights of 1, a loss per token has tokens. A difference of two models on the same rows
    has the difference of their amounts, and is therefore paired: each resample holds the same rows for both. Rows that share a unit
    (several wordings of one fact) are drawn together, for they are not independent.

    BCa (Efron 1987, "Better bootstrap confidence intervals") where it is defined, else percentiles; where all units agree, an interval of
    no width. The same seed gives the same interval.
    """
    amounts, weights = _by_unit(np.asarray(amounts, np.float64), np.asarray(weights, np.float64), units)
    assert len(amounts), "a ratio needs rows"
    assert (weights > 0).all(), "each row needs a weight"
    value = float(amounts.sum() / weights.sum())
    ratios = amounts / weights  # alike up to rounding also where there is one unit alone
    if np.ptp(ratios) <= 1e-12 * np.abs(ratios).max():
        return Interval(value, value, value)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # scipy warns where BCa is not defined; its ends are then NaN, which is looked at below
        drawn = _bootstrap(amounts, weights, resamples, seed, "BCa")
        ends = drawn.confidence_interval
        if not np.isfinite([ends.low, ends.high]).all():
            ends = _bootstrap(amounts, weights, 0, seed, "percentile", drawn).confidence_interval
    return Interval(value, float(ends.low), float(ends.high))


def _by_unit(amounts: np.ndarray, weights: np.ndarray, units: Sequence[Any] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sums over the rows of each unit, in the order in which units first come."""
    if units is None:
        return amounts, weights
    numbers = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
    index = [numbers[unit] for unit in units]
    return np.bincount(index, amounts), np.bincount(index, weights)


def _bootstrap(amounts: np.ndarray, weights: np.ndarray, resamples: int, seed: int, method: str, drawn: Any = None) -> Any:
    return stats.bootstrap(
        (amounts, weights),
        lambda a, w, axis: a.sum(axis=axis) / w.sum(axis=axis),
        n_resamples=resamples,
        batch=max(1, _NUMBERS_AT_ONCE // len(amounts)),
        paired=True,
        vectorized=True,
        confidence_level=LEVEL,
        method=method,
        bootstrap_result=drawn,
        rng=np.random.default_rng(seed),
    )
