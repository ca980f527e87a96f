"""When a step stops waiting for workers that beat but do not get on."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from para_core.group import flights, patience
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
    monkeypatch.setattr(patience, "time", found)
    monkeypatch.setattr(flights, "time", found)
    return found


@pytest.fixture
def group(clock) -> Iterator[Group]:
    """Rank 0 in the second step of a run, with two workers that have just got on."""
    found = Group(Path("none"), lambda *_: {})
    process = SimpleNamespace(kill=lambda: None, tail=lambda _lines: "")
    found._members = [Member(rank, "cpu", process) for rank in (1, 2)]
    found._patience.begin(LIMIT, 20.0)
    with found._patience.step():
        pass
    with found._patience.step():
        beat(found, clock)
        yield found


def beat(group: Group, clock: Clock, waiting: tuple[bool, bool] = (False, False), progress: tuple[int, int] = (1, 1)) -> None:
    for member, waits, done in zip(group.members, waiting, progress, strict=True):
        member.heard = clock.now
        member.beat({"progress": [1, 1, done], "waiting": waits})


def wait(
    group: Group, clock: Clock, seconds: float, waiting: tuple[bool, bool] = (False, False), progress: tuple[int, int] = (1, 1)
) -> None:
    """Rank 0 waits, and the workers beat."""
    for _ in range(round(2 * seconds)):
        clock.now += 0.5
        beat(group, clock, waiting, progress)
        group._check()


def test_the_one_that_others_wait_for_is_lost_after_the_limit(group, clock) -> None:
    wait(group, clock, LIMIT, (True, False))
    with pytest.raises(RankLost, match="rank 2 on cpu did not get on for 60 s"):
        wait(group, clock, 1, (True, False))


def test_nobody_is_lost_while_anyone_gets_on(group, clock) -> None:
    for progress in range(10):
        wait(group, clock, 0.9 * LIMIT, (True, False), (1, progress))


def test_nobody_is_lost_for_what_rank_0_computes_or_sleeps_through(group, clock) -> None:
    for _ in range(3):
        clock.now += 10 * LIMIT  # between two looks
        wait(group, clock, 0.9 * LIMIT, (True, True))


def test_the_first_step_of_a_run_waits_as_long_as_it_likes_and_later_ones_a_multiple_of_the_longest(group, clock) -> None:
    found = group._patience = patience.Patience()  # in no step
    found.begin(LIMIT, 20.0)
    with found.step():
        assert found.limit is None
        wait(group, clock, 100 * LIMIT)
    found.begin(LIMIT, 20.0)
    for limit, lasts in ((None, 0.1), (LIMIT, 8.0), (160.0, 2.0), (160.0, 2.0)):
        with found.step():
            assert found.limit == limit
            clock.now += lasts
        assert found.limit is None, "between steps nothing is expected"


@pytest.mark.parametrize(("device", "waiting", "link"), [("cuda:0", True, True), ("cuda:0", False, False), ("cpu", True, False)])
def test_ranks_that_do_not_connect_are_given_up_while_the_link_is_measured(device, waiting, link, clock, monkeypatch):
    """What NCCL does the first time that two ranks talk may hang on the processor's side, where no device is waited for."""

    def measure(_comm, _device):
        wait(group, clock, 130.0, waiting=(waiting, True))

    group = Group(Path("none"), lambda *_: {})
    process = SimpleNamespace(kill=lambda: None, tail=lambda _lines: "")
    group._members = [Member(rank, "cpu", process) for rank in (1, 2)]
    group._comm = SimpleNamespace(abort=lambda: None)
    monkeypatch.setattr(Member, "tell", lambda *_: None)
    monkeypatch.setattr("para_core.group.group.measure", measure)
    group._device = torch.device(device)
    with pytest.raises(RankLost, match="did not get on for 120 s") as lost:
        group.link()
    assert ("NCCL_P2P_DISABLE" in str(lost.value)) is link is bool(group._silent), "in later prompts nobody waits for it again"


@pytest.mark.parametrize(("waiting", "lost"), [((True, False), "rank 2"), ((False, True), "rank 1"), ((True, True), "rank 1")])
def test_a_forward_that_does_not_land_is_noticed_while_rank_0_is_elsewhere(group, clock, waiting, lost) -> None:
    """In code of others that waits for the device: the thread that listens to the workers looks after it."""
    ended = [False, False]
    for each in range(2):
        group._flights.begin(SimpleNamespace(query=partial(ended.__getitem__, each)), LIMIT)  # type: ignore[arg-type]
        clock.now += 1
    clock.now += LIMIT - 2
    beat(group, clock, waiting)
    group.tend()
    assert group.lost is None
    clock.now += 1
    ended[0] = True
    group.tend()
    assert group.lost is None, "nobody has asked for the first one yet, but it is there"
    clock.now += 1
    group.tend()
    assert group.lost is not None and group.lost.startswith(f"{lost} on cpu did not get on for 60 s")
