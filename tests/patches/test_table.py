"""The README's table "Patches and neighbours" and the tests say the same, row by row."""

from __future__ import annotations

from publishing.checkout import ROOT

from .rows import ALONE, FORWARDS, RUNS, SHARED
from .test_runs import CASES

ONE_GPU = {"hooks", "kv cache", "tome", "hypertile", "multigpu", "written"}  # in test_alone.py; the last in parity/test_foreign.py


def table() -> list[tuple[str, str]]:
    """First two cells of every row."""
    _, _, rest = (ROOT / "README.md").read_text(encoding="utf-8").partition("<!-- patches table -->")
    lines = [line for line in rest.partition("<!-- /patches table -->")[0].splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [(row[0], row[1]) for row in cells[1:] if not set(row[0]) <= set("-")]


def test_every_row_is_tested_and_every_test_has_a_row() -> None:
    assert table() == [(row, "all") for row in SHARED] + [(row, "one") for row in ALONE]
    tested = {row for row, *_ in FORWARDS.values()} | set(RUNS.values())
    assert tested == {*SHARED, *ALONE}


def test_whole_runs_are_those_that_the_rows_name() -> None:
    assert set(CASES) | ONE_GPU == set(RUNS)
    assert {RUNS[name] for name in ONE_GPU} == set(ALONE) and not {RUNS[name] for name in CASES} & set(ALONE)
