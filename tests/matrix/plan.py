"""The runs of the matrix: a covering array and some runs of a second one, and the sample of them that the quick suite does."""

from __future__ import annotations

import random

from .axes import AXES, excluded
from .covering import covering
from .runs import Run

MOST = 1500


def array(seed: int) -> list[Run]:
    return [Run(**run) for run in covering(AXES, excluded, seed)]


def sample(count: int, seed: int) -> set[Run]:
    """Runs with every value of every axis."""
    rng = random.Random(seed)
    found = {rng.choice([run for run in RUNS if getattr(run, axis) == value]) for axis, values in AXES.items() for value in values}
    return found | set(rng.sample(RUNS, count - len(found)))


RUNS = array(1)
RUNS += random.Random(1).sample([run for run in array(2) if run not in RUNS], min(len(RUNS), MOST - 100 - len(RUNS)))
RUNS.sort(key=lambda run: AXES["case"].index(run.case))  # so that a tiny model is built once
SAMPLE = sample(200, 3)
