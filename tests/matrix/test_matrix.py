"""Every family x split x ranks x borders x speeds x cache x shape x mask x neighbour, pairwise: equal to stock at 1e-5."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from .axes import AXES, excluded
from .plan import RUNS, SAMPLE
from .record import Recorder
from .runs import Run, compute, sensitive

pytestmark = pytest.mark.usefixtures("comfy")
TOLERANCE = 1e-5  # relative, per forward, float32


def marked(runs: list[Run], quick: Collection[Run]) -> list:
    return [run if run in quick else pytest.param(run, marks=pytest.mark.slow) for run in runs]


@pytest.mark.parametrize("run", marked(RUNS, SAMPLE), ids=str)
def test_run_equals_stock(run: Run, recorder: Recorder) -> None:
    outcome = compute(run)
    assert outcome.error < TOLERANCE, f"on batch x ring x ulysses = {outcome.degrees}"
    recorder.outcomes[run] = outcome


PLAIN = {axis: values[0] for axis, values in AXES.items()}
ALONE = [
    Run(**{**PLAIN, "case": case, axis: value})
    for case in AXES["case"]
    for axis in ("mask", "neighbour")
    for value in AXES[axis][1:]
    if not excluded(("case", case), (axis, value))
]


@pytest.mark.parametrize("run", marked(ALONE, ALONE[::20]), ids=str)
def test_masks_and_neighbours_change_the_stock_result(run: Run) -> None:
    assert sensitive(run) > 1e-3
