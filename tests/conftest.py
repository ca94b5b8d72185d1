"""What holds for all tests: one thread, no file outside the test's own folder, and skips that are counted and shown."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

# Tiny tensors: a second thread costs more than it gives, and sums then depend on the machine's cores. Read by torch when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _no_test_writes_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Also for fixtures of a session, which are made before a test has a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BURNISH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where burnish keeps its cache in this test: empty at first."""
    folder = tmp_path / "burnish-cache"
    monkeypatch.setenv("BURNISH_CACHE", str(folder))
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A skip is a law that was not tried: each reason is told, with its count."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else str(report.longrepr)
        for report in terminalreporter.stats.get("skipped", [])
    )
    if reasons:
        terminalreporter.section(f"{reasons.total()} skipped")
        for reason, count in reasons.most_common():
            terminalreporter.line(f"{count:4}  {reason}")
