"""Each planted fault is noticed by the tests that its row names. A suite that passes with a fault in the code tests nothing there."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from table import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
FAILED = 1
"""pytest's exit code where tests ran and some failed; a syntax error or an empty choice of tests has another."""

Runner = Callable[[Path, Mutant], tuple[int, str]]


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    """(a copy of the repository, a mutant) → exit code and output of the mutant's tests there."""
    command = [sys.executable, str(Path(__file__).with_name("forks.py"))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(folder: Path, mutant: Mutant) -> tuple[int, str]:
            tests = [f"tests/{test}" for test in mutant.tests]
            chosen = ["-k", mutant.keyword] if mutant.keyword else []
            process.stdin.write(json.dumps([str(folder), "-x", "-q", "--no-header", "--tb=line", *chosen, *tests]) + "\n")
            process.stdin.flush()
            code, output = json.loads(process.stdout.readline())
            return code, output

        yield run
        process.stdin.close()


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package and its tests, to put faults into one at a time."""
    folder = tmp_path_factory.mktemp("mutants")
    for part in ("burnish", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.fault)
def test_the_place_of_the_fault_is_there_exactly_once(mutant):
    assert (ROOT / "burnish" / mutant.file).read_text().count(mutant.old) == 1, "the code has moved on: write the row anew"
    assert mutant.new != mutant.old


@pytest.mark.mutants
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.fault)
def test_the_fault_is_noticed(mutant, copy, runner):
    file = copy / "burnish" / mutant.file
    sound = (ROOT / "burnish" / mutant.file).read_text()
    try:
        file.write_text(sound.replace(mutant.old, mutant.new))
        code, output = runner(copy, mutant)
    finally:
        file.write_text(sound)
    assert code == FAILED, f"it survived (exit code {code}):\n{output}"
    assert "ERROR" not in output.rpartition("short test summary")[2], f"the tests did not run:\n{output}"


@pytest.mark.mutants
def test_without_a_fault_the_same_tests_pass(copy, runner):
    """Else each of them would be noticed by whatever fails anyway."""
    every = Mutant("none", "", "", "", tuple(sorted({test for mutant in MUTANTS for test in mutant.tests})), " or ".join(_words()))
    code, output = runner(copy, every)
    assert code == 0, output


def _words() -> list[str]:
    return sorted({f"({mutant.keyword})" for mutant in MUTANTS if mutant.keyword})
