"""Context windows: parts of a long video share their conditions, and must not be taken for each other."""

from __future__ import annotations

from typing import Any

import pytest
from cache.reference import Reference
from cache.test_decisions import compare, mixed
from parity.inprocess import Job, error, load, run, sample

from para_core.settings import Cache, Parallel

pytestmark = pytest.mark.usefixtures("comfy")
TOLERANCE = 1e-5  # relative, per forward, float32
JOB = Job("wan", (7, 4, 6), steps=6)


def windowed(schedule: str = "standard_static", **changes: Any) -> Any:
    """Stock node on the tiny Wan: windows of three latent frames, overlapping by one."""
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    options = {"context_length": 3, "context_overlap": 1, "context_stride": 1, "closed_loop": False, "freenoise": False} | changes
    return ContextWindowsManualNode.execute(load("wan"), context_schedule=schedule, fuse_method="pyramid", dim=2, **options).result[0]


@pytest.mark.parametrize(
    "ranks, schedule, job",
    [
        (1, "standard_static", JOB),
        pytest.param(1, "batched", JOB.but(cfg=5.0), marks=pytest.mark.slow),
        (3, "standard_static", JOB.but(cfg=5.0)),
        pytest.param(3, "batched", JOB.but(cfg=5.0, tokens=(11, 7)), marks=pytest.mark.slow),
    ],
)
def test_every_window_is_compared_with_itself(ranks: int, schedule: str, job: Job) -> None:
    model, reference = windowed(schedule), Reference(0.2)
    expected = sample(reference.attach(model), job)
    result, report = run(model, job, Cache(0.2), Parallel(ranks))
    compare(report, reference)
    mixed(report)
    assert report["ranks"] == ranks
    assert error(result, expected) < TOLERANCE * report["forwards"]


@pytest.mark.parametrize("parallel", [Parallel(3, batch_degree=1), Parallel(2, batch_degree=2)], ids=["3 sequence", "2 batch"])
def test_windows_are_split_like_other_forwards(parallel: Parallel) -> None:
    job = JOB.but(steps=2, cfg=3.0, tokens=(11, 7))
    result, report = run(windowed(), job, parallel)
    assert report["ranks"] == parallel.gpus and report["notes"] == []
    assert error(result, sample(windowed(), job)) < TOLERANCE * report["forwards"]


@pytest.mark.parametrize("schedule", ["standard_uniform", pytest.param("looped_uniform", marks=pytest.mark.slow)])
def test_windows_that_move_are_not_cached_and_a_sentence_says_so(schedule: str) -> None:
    job = JOB.but(steps=3)
    result, report = run(windowed(schedule), job, Cache(0.5), Parallel(2))
    (note,) = report["notes"]
    assert schedule in note and "No step is cached" in note
    assert error(result, sample(windowed(schedule), job)) < TOLERANCE * report["forwards"]
    assert report["changes"] == []
