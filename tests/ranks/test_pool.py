"""The pool itself: one failure is told, and is not the next test's."""

import os
import time

import pytest

from tests.ranks.pool import Pool

pytestmark = pytest.mark.ranks


def fails(rank: str, without_end: str = "", dies: bool = False) -> str:
    if os.environ["RANK"] == rank:
        if dies:
            os._exit(3)
        raise ValueError("this rank alone")
    if os.environ["RANK"] == without_end:
        time.sleep(3600)  # as in a collective that the other never joins
    return os.environ["RANK"]


def test_a_rank_that_fails_is_told_at_once_and_the_next_job_runs():
    pool = Pool(2)
    try:
        with pytest.raises(AssertionError, match="this rank alone"):
            pool.run(2, fails, "1", "0")
        assert pool.run(2, fails, "none") == ["0", "1"]
        with pytest.raises(AssertionError, match="rank 0 died with 3"):
            pool.run(2, fails, "0", "none", True)
        assert pool.run(2, fails, "none") == ["0", "1"]
    finally:
        pool.close()
