"""Rows of each source in an epoch: whole numbers that are promised exactly, and the same bytes for the same seed."""

from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.config import DataConfig, MixtureSource
from burnish.data import packing
from burnish.data.draws import STREAMS, draws, shuffled
from burnish.data.mixture import REPLAY, by_source, counts, mix, mixed, replay_count
from burnish.data.tokens import open_tokens, write_tokens
from burnish.errors import UserError


def part(source: str, weight: float | None = None, epochs: float = 1.0) -> MixtureSource:
    return MixtureSource(source=source, weight=weight, epochs=epochs)


def refusal(sizes, *parts) -> str:
    with pytest.raises(UserError) as caught:
        counts(sizes, parts)
    return str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "parts", "expected"),
    [
        ({"a": 7, "b": 3}, (part("a"), part("b")), {"a": 7, "b": 3}),
        ({"a": 7, "b": 3}, (part("a", epochs=0.5), part("b", epochs=2.5)), {"a": 4, "b": 8}),  # 3.5 and 7.5, to even
        ({"a": 90, "b": 90}, (part("a", 0.9), part("b", 0.1)), {"a": 90, "b": 10}),  # 100 rows: a is used up
        ({"a": 91, "b": 3}, (part("a", 9.0), part("b", 1.0)), {"a": 27, "b": 3}),  # 30 rows: b is used up
        ({"a": 91, "b": 3}, (part("a", 9.0), part("b", 1.0, epochs=3)), {"a": 81, "b": 9}),
        ({"a": 7, "b": 7, "c": 7}, (part("a", 1), part("b", 1), part("c", 1)), {"a": 7, "b": 7, "c": 7}),
        ({"a": 11, "b": 101}, (part("a", 0.3), part("b", 0.7)), {"a": 11, "b": 25}),  # 36 rows: 10.8 and 25.2
        ({"a": 5, "b": 5}, (part("a", 0.0), part("b", 2.0)), {"a": 0, "b": 5}),
        ({"a": 3, "b": 30}, (part("a", 0.1), part("b", 0.9)), {"a": 3, "b": 27}),  # 3 / 0.1 must be 30, which floats make of it or not
    ],
)
def test_each_source_has_exactly_its_share_of_an_epoch(sizes, parts, expected):
    assert counts(sizes, parts) == expected


@given(st.lists(st.tuples(st.integers(1, 400), st.integers(1, 40), st.integers(1, 5)), min_size=1, max_size=4), st.integers(0, 3))
def test_counts_are_round_of_weight_times_rows_and_no_row_comes_twice_more_than_another(sources, seed):
    parts = tuple(part(f"s{at}", weight / 10, float(epochs)) for at, (_, weight, epochs) in enumerate(sources))
    names = [f"s{at}" for at, (size, _, _) in enumerate(sources) for _ in range(size)]
    total = sum(Fraction(weight) for _, weight, _ in sources)
    rows = int(min(size * epochs / (weight / total) for size, weight, epochs in sources))
    if 0 in [round(Fraction(weight) / total * rows) for _, weight, _ in sources]:
        with pytest.raises(UserError, match="gives it none"):
            mixed(names, parts, 0.0, seed)
        return
    order = mixed(names, parts, 0.0, seed)
    got = Counter(names[at] for at in order)
    times = Counter(order)
    for at, (_, weight, epochs) in enumerate(sources):
        assert got[f"s{at}"] == round(Fraction(weight) / total * rows)
        own = [times[row] for row, name in enumerate(names) if name == f"s{at}"]
        assert max(own) - min(own) <= 1
        assert max(own) <= epochs
    assert order == sorted(order)


@pytest.mark.parametrize(("own", "share", "expected"), [(9, 0.1, 1), (90, 0.1, 10), (7, 0.5, 7), (101, 0.25, 34), (3, 0.9, 27)])
def test_replay_is_its_share_of_all_rows(own, share, expected):
    assert replay_count(own, share) == expected
    names = ["mine"] * own + [REPLAY] * 5
    assert Counter(names[at] for at in mixed(names, (), share, 0)) == {"mine": own, REPLAY: expected}


def test_every_own_row_comes_once_beside_replay():
    names = [REPLAY, "a", "b", REPLAY, "a"]
    times = Counter(mixed(names, (), 0.25, 0))
    assert [times[at] for at in (1, 2, 4)] == [1, 1, 1]
    assert times[0] + times[3] == 1


def test_the_same_seed_gives_the_same_rows_and_another_gives_others():
    names = ["a"] * 100 + ["b"] * 100
    parts = (part("a", 1.0, 0.31), part("b", 3.0))
    assert mixed(names, parts, 0.0, 5) == mixed(names, parts, 0.0, 5)
    assert mixed(names, parts, 0.0, 5) != mixed(names, parts, 0.0, 6)
    assert shuffled(1000, 1, "set") != shuffled(1000, 1, "replay")
    assert sorted(shuffled(1000, 1, "set")) == list(range(1000))
    assert shuffled(8, 0, "mixture") == [6, 4, 3, 0, 2, 1, 5, 7], "a draw has changed: runs that stand cannot be made again"


def test_weights_that_cannot_be_kept_are_refused():
    assert "the weights sum to 0" in refusal({"a": 3, "b": 3}, part("a", 0.0), part("b", 0.0))
    assert "some sources have a weight and b has none" in refusal({"a": 3, "b": 3}, part("a", 1.0), part("b"))
    assert "names a twice" in refusal({"a": 3}, part("a", 1.0), part("a", 2.0))
    assert "b has no row to train on" in refusal({"a": 3}, part("a", 1.0), part("b", 1.0))
    message = refusal({"a": 4, "b": 4}, part("a", 1.0), part("b", 0.01))
    assert message == "data.mixture: of 4 rows in an epoch, b's weight gives it none. Raise its weight, or remove it."


@pytest.mark.parametrize("value", [{"weight": -1.0}, {"epochs": 0.0}, {"weight": float("nan")}])
def test_a_negative_weight_and_no_epochs_are_refused(value):
    with pytest.raises(ValueError, match=r"greater than|finite"):
        MixtureSource(source="a", **value)


def test_a_store_is_written_anew_with_the_samples_of_an_epoch(tmp_path):
    samples = [([1, 2, at], [0, 1, 1], (at,)) for at in range(7)]
    write_tokens(tmp_path / "train", samples)
    names = ["a"] * 4 + ["b"] * 3
    config = DataConfig(mixture=(part("a", 1.0, 2.0), part("b", 1.0)))
    written = mix(tmp_path / "train", names, config)
    store = open_tokens(tmp_path / "train")
    order = mixed(names, config.mixture, 0.0, config.seed)
    assert (written["samples"], len(order)) == (6, 6)
    assert [store.rows_of(at) for at in range(6)] == [(row,) for row in order]
    assert [store.sample(at)[0].tolist() for at in range(6)] == [[1, 2, row] for row in order]
    assert np.array_equal(store.supervised, [2] * 6)
    assert by_source(tmp_path / "train", ["a"] * 4 + ["documents"] * 3) == {
        "a": {"rows": 3, "samples": 3, "tokens": 9},
        "documents": {"rows": 3, "samples": 3, "tokens": 9},
    }
    assert not list(tmp_path.glob(".*")), "something half written stays"
    assert replace(config, seed=1).mixture == config.mixture


def test_no_two_kinds_of_draws_share_a_stream():
    orders = [shuffled(99, 0, stream, number) for stream in STREAMS for number in range(12)]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert {"set", "validation", "packing"} <= STREAMS.keys()


def test_packing_meets_no_other_draw_in_any_epoch(monkeypatch):
    """Its first draws are the order of samples, which is what others draw too."""
    drawn = []
    monkeypatch.setattr(packing, "draws", lambda *which: drawn.append(draws(*which).random_raw(99).tolist()) or draws(*which))
    for epoch in range(12):
        packing.pack(np.arange(1, 100), 128, 0, epoch)
    others = [draws(0, stream, number).random_raw(99).tolist() for stream in STREAMS if stream != "packing" for number in range(12)]
    assert len(drawn) == 12
    assert [epoch for epoch, order in enumerate(drawn) if order in others] == []
