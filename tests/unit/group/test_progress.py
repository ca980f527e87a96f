"""When a step stops waiting for workers that beat but do not get on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from para_core.group import group as module
from para_core.group.group import Group
from para_core.group.member import Member, RankLost

LIMIT = 60.0


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module, "time", found)
    return found


@pytest.fixture
def group(clock) -> Group:
    """Rank 0 in a step, with two workers that have just got on."""
    found = Group(Path("none"), lambda *_: {})
    process = SimpleNamespace(kill=lambda: None, tail=lambda _lines: "")
    found._members = [Member(rank, "cpu", process) for rank in (1, 2)]
    found._looked = found._waiting = clock.now
    found._patience = LIMIT
    beat(found, clock, 1)
    return found


def beat(group: Group, clock: Clock, progress: int, waiting: tuple[bool, bool] = (False, False)) -> None:
    for member, waits in zip(group.members, waiting, strict=True):
        member.heard = clock.now
        member.beat({"progress": [1, 1, progress], "waiting": waits})


def wait(group: Group, clock: Clock, seconds: float, waiting: tuple[bool, bool] = (False, False), progress: int = 1) -> None:
    """Rank 0 waits, and the workers beat."""
    for _ in range(round(2 * seconds)):
        clock.now += 0.5
        beat(group, clock, progress, waiting)
        group._check()


def test_the_one_that_others_wait_for_is_lost_after_the_limit(group, clock) -> None:
    wait(group, clock, LIMIT, (True, False))
    with pytest.raises(RankLost, match="rank 2 on cpu did not get on for 60 s"):
        wait(group, clock, 1, (True, False))


def test_nobody_is_lost_while_anyone_gets_on(group, clock) -> None:
    for progress in range(10):
        wait(group, clock, 0.9 * LIMIT, (True, False), progress)


def test_nobody_is_lost_for_what_rank_0_computes_or_sleeps_through(group, clock) -> None:
    for _ in range(3):
        clock.now += 10 * LIMIT  # between two looks
        wait(group, clock, 0.9 * LIMIT, (True, True))


def test_the_first_step_of_a_run_waits_as_long_as_it_likes_and_later_ones_a_multiple_of_the_longest(group, clock) -> None:
    group._longest, group._floor = None, group.timeouts.stuck
    group._patience = None
    with group._patient():
        assert group._patience is None
        wait(group, clock, 100 * LIMIT)
    for longest, limit in ((0.1, 60.0), (8.0, 160.0)):
        group._longest = longest
        with group._patient():
            assert group._patience == limit
    assert group._patience is None, "and between steps nothing is expected"
