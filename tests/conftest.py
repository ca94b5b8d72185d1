"""What holds for all tests: one thread, no file outside the test's own folder, skips that are counted and shown, and time that is kept."""

import os
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

# Tiny tensors: a second thread costs more than it gives, and sums then depend on the machine's cores. Read by torch when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


BUDGET_SECONDS = {"fast": 180, "plan": 240, "ranks": 420, "model": 300, "mutants": 480, "support": 600, "gpu": 600}
"""Of each tier, on two cores. A run fails at one and a half times as much: slow tests are tests that nobody runs."""
_numbers = count()
_seconds: Counter[str] = Counter()
_tier: dict[str, str] = {}
"""Of each test that is marked with one."""


@pytest.fixture(scope="session", autouse=True)
def _no_test_writes_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Also for fixtures of a session, which are made before a test has a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BURNISH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where burnish keeps its cache in this test: not there at first, like no other test's."""
    # a name alone: `tmp_path` would make a folder for each of thousands of tests, and look through all before it for a free number
    folder = tmp_path_factory.getbasetemp() / f"burnish-cache-{next(_numbers)}"
    monkeypatch.setenv("BURNISH_CACHE", str(folder))
    return folder


@pytest.fixture
def real_data() -> Path:
    """The folder of real documents and sets, which are not part of the repository: a test without it is skipped, and counted."""
    folder = os.environ.get("BURNISH_TEST_DATA")
    if not folder:
        pytest.skip("BURNISH_TEST_DATA is not set")
    return Path(folder)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Whatever the environment says."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """By mark, not by keyword: the folder `tests/model` would make all that lies in it one of the tier `model`."""
    for item in items:
        if item.nodeid.startswith("tests/plan/") and not any(item.get_closest_marker(name) for name in BUDGET_SECONDS):
            item.add_marker("plan")  # whole steps are simulated there, and held to real ones
    _tier.update({item.nodeid: name for item in items for name in BUDGET_SECONDS if item.get_closest_marker(name)})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[_tier.get(report.nodeid, "fast")] += report.duration  # pyright: ignore[reportArgumentType]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _over() and session.exitstatus == 0:
        session.exitstatus = 1


def _over() -> list[str]:
    return [tier for tier, seconds in _seconds.items() if seconds > 1.5 * BUDGET_SECONDS[tier]]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A skip is a law that was not tried: each reason is told, with its count. And what each tier took."""
    tiers = [f"{tier} {seconds:.0f} s of {BUDGET_SECONDS[tier]}" for tier, seconds in _seconds.items()]
    terminalreporter.line(f"time: {', '.join(tiers)}{'; OVER: ' + ', '.join(_over()) if _over() else ''}")
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else str(report.longrepr)
        for report in terminalreporter.stats.get("skipped", [])
    )
    if reasons:
        terminalreporter.section(f"{reasons.total()} skipped")
        for reason, count in reasons.most_common():
            terminalreporter.line(f"{count:4}  {reason}")
