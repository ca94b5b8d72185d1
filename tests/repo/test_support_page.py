"""docs/support.md says no more than was run: it is made from the tables and the record of `make support`, and neither is stale."""

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from burnish.model.formats import FORMATS
from tests.ranks import record
from tests.ranks.cells import Cell, all_cells, runnable


@pytest.fixture(scope="module")
def support() -> dict:
    return runpy.run_path(str(Path(record.FILE).with_name("support.py")))


CELL = Cell("dora", "nf4", "fsdp")


def test_the_page_is_what_the_tables_and_the_record_say(support):
    made = support["page"](record.read())
    assert (record.FILE.with_name("support.md")).read_text(encoding="utf-8") == made, "python docs/support.py"


def test_the_record_names_no_cell_that_the_tables_have_not_or_refuse():
    assert record.read()["cells"].keys() <= {cell.name for cell in runnable()}, "make support"


def test_a_cell_is_proven_only_by_a_run_of_these_laws_and_of_this_format(support, monkeypatch):
    said = {CELL.name: record.entry(CELL, record.PROVEN)}
    assert support["word"](CELL, said) == "proven"
    assert support["word"](CELL, {}) == "not run"
    assert support["word"](replace(CELL, format="none"), said) == "not run"
    assert support["word"](replace(CELL, method="full"), said) == "refused"
    monkeypatch.setitem(FORMATS, "nf4", replace(FORMATS["nf4"], version=FORMATS["nf4"].version + 1))
    assert support["word"](CELL, said) == "not run"


def test_a_row_that_was_never_run_is_on_the_page_as_not_run(support):
    made = support["page"]({"about": {}, "cells": {CELL.name: record.entry(CELL, record.PROVEN)}})
    assert f"1 are proven, {len(all_cells()) - len(runnable())} refused and {len(runnable()) - 1} not run" in made
    assert "| `nf4` | not run | not run | proven |" in made
    assert "(1) adapt.method = 'full' trains the weights themselves, and model.format = … holds them in codes" in made


def test_a_cell_that_failed_has_no_page(support):
    with pytest.raises(SystemExit, match="dora/nf4/fsdp"):
        support["page"]({"about": {}, "cells": {CELL.name: record.entry(CELL, record.FAILED)}})


def test_a_run_is_recorded_beside_the_others_and_one_that_never_ended_as_failed(tmp_path):
    file, other = tmp_path / "support.json", replace(CELL, strategy="ddp")
    file.write_text(json.dumps({"about": {}, "cells": {"dora/nf9/fsdp": "proven", CELL.name: record.entry(CELL, record.PROVEN)}}))
    record.failed(other, file)
    assert record.read(file)["cells"] == {other.name: f"failed: {other.version}", CELL.name: f"proven: {CELL.version}"}
    record.proven(other, file)
    assert record.read(file)["cells"][other.name] == f"proven: {other.version}"
    assert record.read(file)["burnish"] == "support/1"
