"""Rank 0's group without workers: what it lets go of, and when."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from para_core.group import group as groups
from para_core.group.channel import ChannelClosed
from para_core.group.group import Group, GroupError
from para_core.group.member import Member, RankLost
from para_core.group.transport import REMEDY, CommunicationFailed


def process(alive: bool = True) -> SimpleNamespace:
    """One that runs, and does not answer."""

    def unanswered(_timeout: float) -> None:
        raise ChannelClosed("no answer")

    return SimpleNamespace(alive=lambda: alive, kill=lambda: None, pid=1, open_channel=unanswered, tail=lambda _lines: "")


@pytest.mark.parametrize(("lost", "ended"), [(None, []), ("rank 1 was lost", ["abort", "close"])])
def test_a_communicator_that_was_lost_is_gone_before_its_step_is_computed_again(lost, ended):
    """A message on a stream of its own may still be arriving, in memory that the step has freed; closing waits for its end."""
    events: list[str] = []
    group = Group(Path("none"), lambda *_: {})
    group._comm = SimpleNamespace(abort=lambda: events.append("abort"), close=lambda: events.append("close"))  # type: ignore[assignment]
    group.lost = lost
    group.end()
    assert events == ended


def test_workers_that_do_not_start_are_met_again_by_the_run_and_those_that_did_are_not_forgotten(monkeypatch, caplog):
    group = Group(Path("none"), lambda *_: {})
    started: list[SimpleNamespace] = []

    def start() -> SimpleNamespace:
        if len(started) == 1:
            raise OSError(12, "Cannot allocate memory")
        started.append(process())
        return started[-1]

    monkeypatch.setattr(group._pool, "start", start)
    group.expect(["cpu", "cpu"])
    assert "Cannot allocate memory" in caplog.text
    assert [member.process for member in group.members] == started, "the next attempt goes on with it"
    with pytest.raises(GroupError, match="Cannot allocate memory"):
        group.form(torch.device("cpu"), ["cpu", "cpu"])
    caplog.clear()
    started[0].alive = lambda: False
    monkeypatch.setattr(group._pool, "end", lambda process: None)
    group.end()  # after a loss it starts workers for the next run
    assert "Cannot allocate memory" in caplog.text


def test_a_worker_that_was_to_be_another_rank_is_not_taken_for_the_one_that_did_not_start(monkeypatch):
    group = Group(Path("none"), lambda *_: {})
    answers = iter([True, True, False, True])

    def start() -> SimpleNamespace:
        if not next(answers):
            raise OSError(12, "Cannot allocate memory")
        return process()

    monkeypatch.setattr(group._pool, "start", start)
    monkeypatch.setattr(group._pool, "end", lambda process: None)
    group.warm(["cpu", "cpu"])
    group.members[0].process.alive = lambda: False
    group.expect(["cpu", "cpu"])  # the first rank's worker does not start again
    group.warm(["cpu"])
    assert [member.rank for member in group.members] == [1]


@pytest.mark.parametrize(
    "error", [CommunicationFailed(f"nothing arrives; {REMEDY}"), RuntimeError(f"changed; {REMEDY}"), RuntimeError("out of memory")]
)
def test_messages_that_did_not_arrive_are_not_waited_for_in_every_prompt(error, monkeypatch):
    """Finding it out takes a minute, in which a prompt does not begin. Other failures may be over by then."""
    group, starts = Group(Path("none"), lambda *_: {}), []

    class Silent(Member):
        def tell(self, kind, payload=None):
            pass

    def measure(*_):
        raise error

    monkeypatch.setattr(groups, "measure", measure)
    monkeypatch.setattr(groups, "_EXPLAINED", 0.0)
    monkeypatch.setattr(group, "warm", starts.append)
    group._members = [Silent(1, "cuda:1", SimpleNamespace(tail=lambda _lines: ""))]  # type: ignore[arg-type]
    group._comm = SimpleNamespace(abort=lambda: None, close=lambda: None, aborted=False)  # type: ignore[assignment]
    with pytest.raises(RankLost):
        group.link()
    known = REMEDY in str(error)
    group.expect(["cuda:1"])
    group.lost = None
    if known:
        with pytest.raises(GroupError, match="NCCL_P2P_DISABLE=1.*restarted"):
            group.form(torch.device("cpu"), ["cuda:1"])
    else:
        group.form(torch.device("cpu"), ["cuda:1"])
    assert bool(starts) is not known
    group.expect(["cuda:2"])
    assert starts[-1:] == [["cuda:2"]], "another card may be reached"


@pytest.mark.parametrize(("said", "tries"), [(f"did not connect in time; {REMEDY}", 1), ("rank 1 did not join within 60 s", 2)])
def test_ranks_that_met_and_did_not_connect_are_not_met_again(said, tries, monkeypatch):
    """It takes a minute each time, twice in every prompt."""
    group, joined = Group(Path("none"), lambda *_: {}), []

    def join():
        joined.append(1)
        raise CommunicationFailed(said)

    monkeypatch.setattr(group, "warm", lambda _devices: None)
    monkeypatch.setattr(group, "_join", join)
    for _ in range(2):
        with pytest.raises(GroupError, match=said.partition(";")[0]):
            group.form(torch.device("cpu"), ["cuda:1"])
    assert len(joined) == (tries if tries == 1 else 2 * tries)


@pytest.mark.parametrize(
    ("error", "said"), [(CommunicationFailed("NCCL: remote error"), "rank 1 on cuda:1: NCCL: no room"), (OSError("no file"), "no file")]
)
def test_what_is_said_of_ranks_that_do_not_connect_is_what_the_first_of_them_met(error, said, monkeypatch):
    group = Group(Path("none"), lambda *_: {})
    member = Member(1, "cuda:1", SimpleNamespace())  # type: ignore[arg-type]

    def join():
        group._told = None  # as it begins
        group._comm = SimpleNamespace(abort=lambda: None, close=lambda: None, aborted=True)  # type: ignore[assignment]
        group.hear(member, "failed", {"epoch": 0, "peer": True, "message": "NCCL: no room"})
        raise error

    monkeypatch.setattr(group, "warm", lambda _devices: None)
    monkeypatch.setattr(group, "_join", join)
    with pytest.raises(GroupError, match=f"^{said}$"):
        group.form(torch.device("cpu"), ["cuda:1"])


def test_what_workers_have_to_say_is_kept_for_this_run_and_no_answer_to_anything():
    group = Group(Path("none"), lambda *_: {})
    members = [Member(rank, f"cuda:{rank}", SimpleNamespace()) for rank in (1, 2)]  # type: ignore[arg-type]
    for member in members:
        group.hear(member, "said", "No kernels.")
    assert [*group.sayings()] == [("cuda:1", "No kernels."), ("cuda:2", "No kernels.")] and not [*group.sayings()]
    assert all(member.replies.empty() for member in members)
    group.hear(members[0], "said", "Too late.")
    group.begin()
    assert not [*group.sayings()]


def test_what_a_worker_has_dropped_is_known_whatever_comes_after_it():
    group = Group(Path("none"), lambda *_: {})
    member = Member(1, "cuda:1", SimpleNamespace(), models={1: "held", 2: "held"})  # type: ignore[arg-type, dict-item]
    group.hear(member, "dropped", 1)
    assert [*member.models] == [2] and member.replies.empty()


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


@pytest.mark.parametrize(("heard", "said"), [("before", "rank 1 on cuda:1: NCCL: no room"), ("after", "NCCL: here")])
def test_what_is_said_of_ranks_that_lost_touch_is_what_the_first_of_them_met(heard, said, monkeypatch):
    """A rank whose own library fails is known to the others only as one that has gone; what it met tells the remedy."""
    monkeypatch.setattr("para_core.group.group._EXPLAINED", 0.0)
    group = Group(Path("none"), lambda *_: {})
    group._comm = SimpleNamespace(abort=lambda: None)  # type: ignore[assignment]
    member = Member(1, "cuda:1", SimpleNamespace())  # type: ignore[arg-type]
    failure = {"epoch": 0, "peer": True, "message": "NCCL: no room"}
    with pytest.raises(RankLost, match=f"the ranks lost touch: {said}"), group._shared():
        if heard == "before":
            group.hear(member, "failed", failure)
        monkeypatch.setattr(group, "give_up", lambda reason: (group.hear(member, "failed", failure), Group.give_up(group, reason)))
        raise CommunicationFailed("NCCL: here")


@pytest.mark.parametrize(
    ("printed", "told"),
    [
        ("", ""),
        ("ready\nworker.py:1: FutureWarning: check is old\n  check(\n\n", ' (its last line: "worker.py:1: FutureWarning: check is old")'),
        ('Traceback\n  File "worker.py"\n    raise\nRuntimeError: no', ' (its last line: "RuntimeError: no")'),
    ],
)
def test_what_is_told_of_a_worker_is_no_line_of_its_source(printed: str, told: str) -> None:
    assert Member(1, "cuda:1", SimpleNamespace(tail=lambda _lines: printed)).last_line() == told  # type: ignore[arg-type]
