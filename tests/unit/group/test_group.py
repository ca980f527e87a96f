"""Rank 0's group without workers: what it lets go of, and when."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from para_core.group.group import Group


@pytest.mark.parametrize(("lost", "ended"), [(None, []), ("rank 1 was lost", ["abort", "close"])])
def test_a_communicator_that_was_lost_is_gone_before_its_step_is_computed_again(lost, ended):
    """A message on a stream of its own may still be arriving, in memory that the step has freed; closing waits for its end."""
    events: list[str] = []
    group = Group(Path("none"), lambda *_: {})
    group._comm = SimpleNamespace(abort=lambda: events.append("abort"), close=lambda: events.append("close"))  # type: ignore[assignment]
    group.lost = lost
    group.end()
    assert events == ended
