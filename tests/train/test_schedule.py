import pytest

from burnish.config import TrainConfig
from burnish.train.schedule import SHAPES, rate, warmup_steps


@pytest.mark.parametrize("shape", list(SHAPES))
def test_the_rate_rises_over_the_warm_up_and_never_exceeds_the_highest(shape):
    config = TrainConfig(lr=1.0, schedule=shape, warmup=10)
    rates = [rate(step, 100, config) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert max(rates) <= 1.0
    assert min(rates) > 0, "no step is wasted on a rate of 0"


def test_the_shapes_are_what_they_are_called():
    def at(shape: str, step: int) -> float:
        return rate(step, 100, TrainConfig(lr=1.0, schedule=shape, warmup=0))

    assert [at("constant", step) for step in (0, 50, 99)] == [1.0, 1.0, 1.0]
    assert [at("linear", step) for step in (0, 50, 99)] == pytest.approx([1.0, 0.5, 0.01])
    assert [at("cosine", step) for step in (0, 50, 99)] == pytest.approx([1.0, 0.5, 0.000247], abs=1e-5)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_the_rate_falls_to_its_floor_and_no_further(shape):
    config = TrainConfig(lr=2.0, schedule=shape, warmup=10, lr_floor=0.1)
    rates = [rate(step, 110, config) for step in range(110)]
    assert rates[10] == max(rates) == 2.0
    assert rates[60] == pytest.approx(1.1), "half-way between 2 and 0.2"
    assert 0.2 < rates[-1] == min(rates[10:]) < 0.225
    assert rate(110, 110, config) == pytest.approx(0.2)
    without = TrainConfig(lr=2.0, schedule=shape, warmup=10)
    assert rates[:10] == [rate(step, 110, without) for step in range(10)], "the warm-up knows no floor"


def test_a_constant_rate_knows_no_floor():
    assert {rate(step, 9, TrainConfig(lr=1.0, schedule="constant", warmup=0, lr_floor=0.3)) for step in range(9)} == {1.0}


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"), [(0.03, 100, 3), (0.5, 7, 4), (0.0, 5, 0), (1, 100, 1), (20, 100, 20), (20, 5, 5)]
)
def test_a_warm_up_below_one_is_a_share_and_from_one_on_a_number_of_steps(warmup, steps, expected):
    assert warmup_steps(steps, TrainConfig(warmup=warmup)) == expected
