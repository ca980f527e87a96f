"""Rank 0's group without workers: what it lets go of, and when."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from para_core.group.group import Group
from para_core.group.member import Member


@pytest.mark.parametrize(("lost", "ended"), [(None, []), ("rank 1 was lost", ["abort", "close"])])
def test_a_communicator_that_was_lost_is_gone_before_its_step_is_computed_again(lost, ended):
    """A message on a stream of its own may still be arriving, in memory that the step has freed; closing waits for its end."""
    events: list[str] = []
    group = Group(Path("none"), lambda *_: {})
    group._comm = SimpleNamespace(abort=lambda: events.append("abort"), close=lambda: events.append("close"))  # type: ignore[assignment]
    group.lost = lost
    group.end()
    assert events == ended


def test_the_rate_of_every_worker_is_known_by_rank_and_each_is_asked_once():
    group = Group(Path("none"), lambda *_: {})
    asked: list[tuple[int, str, str]] = []

    class Asked(Member):
        def tell(self, kind, payload=None):
            asked.append((self.rank, kind, payload))
            self.replies.put((kind, 1e14 * self.rank))

    group._members = [Asked(rank, f"cuda:{rank}", SimpleNamespace()) for rank in (1, 2)]  # type: ignore[arg-type]
    assert [group.rates(torch.bfloat16) for _ in range(2)] == [(1e14, 2e14)] * 2
    assert asked == [(1, "rate", "bfloat16"), (2, "rate", "bfloat16")]
