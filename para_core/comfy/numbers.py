"""A sampling run in numbers: what its line in the log says and its report is made of."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ..sequence.mesh import Degrees
from . import calls
from .wording import kind

if TYPE_CHECKING:
    from .session import Session


def report(run: Session) -> dict[str, Any]:
    """Plain data. Seconds are those of the forwards, ``wall`` those from the first one to the result."""
    degrees = run.split.used if run.split is not None else Degrees()
    records = run.decisions.records if run.decisions else []
    timeline = run.meter.steps()
    previous = run.chooser.previous if run.chooser is not None else None
    return {
        "model": type(run.model).__name__,
        "ranks": degrees.world,
        "degrees": [degrees.batch, degrees.ring, degrees.ulysses],
        "shares": run.split.shares() if run.split is not None else None,
        "steps": run.steps,
        "forwards": run.forwards,
        "cached": run.cached() or 0,
        "seconds_per_step": round(sum(step["seconds"] for step in timeline) / max(1, run.steps), 4),
        "wall": round(run.meter.seconds, 4),
        "timeline": timeline,
        "cache": dataclasses.asdict(run.caching) if run.caching is not None and run.decisions is not None else None,
        "changes": [[record.sigma, list(record.changes), record.hit] for record in records],
        "exchange": exchange(run) if degrees.world > 1 else None,
        "opening": run.meter.opening,
        "attention": run.chooser.report() if run.chooser is not None else [],
        "backend": run.attention.backend if run.attention is not None else None,
        "override": calls.title(previous) if previous is not None else None,
        "kernels": [[name, kind(asked), count] for (name, asked), count in run.chooser.kinds.most_common()] if run.chooser else [],
        "replays": run.runner.graphs.replays if run.runner is not None else 0,
        "notes": run.notes.said,
    }


def exchange(run: Session) -> dict[str, Any]:
    assert run.runner is not None, "there is no split without one"
    return {**run.meter.exchange(), **run.runner.override.ways.report()}
