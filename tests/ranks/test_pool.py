"""The pool itself: one failure is told, and is not the next test's."""

import os
import time

import pytest

from tests.ranks.pool import Pool

pytestmark = pytest.mark.ranks


def fails(how: str) -> str:
    if how == "all raise":
        raise ValueError("this is what happened")
    if how == "one dies" and os.environ["RANK"] == "1":
        os._exit(3)
    if how == "one dies":
        time.sleep(3600)  # as in a collective that the other never joins
    return os.environ["RANK"]


def test_a_rank_that_fails_is_told_at_once_and_the_next_job_runs():
    pool = Pool(2)
    try:
        with pytest.raises(AssertionError, match="this is what happened"):
            pool.run(2, fails, "all raise")
        with pytest.raises(AssertionError, match="rank 1 died with 3"):
            pool.run(2, fails, "one dies")
        assert pool.run(2, fails, "not at all") == ["0", "1"]
    finally:
        pool.close()
