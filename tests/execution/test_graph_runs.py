"""Whole runs by CUDA graphs, which recordings of CPU operations stand in for: results, the cache's parts, and when captures go."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from execution import fake_graphs
from parity import inprocess

JOB = inprocess.Job("flux_small", steps=6)


@pytest.fixture
def card(comfy, monkeypatch) -> Iterator[fake_graphs.Card]:
    """Graphs on the CPU, for runs that ask for them."""
    from para_core.comfy.session import Session
    from para_core.execution import graphs, runner

    monkeypatch.setattr(runner, "Graphs", lambda say: graphs.Graphs(say, "cpu"))
    monkeypatch.setattr(Session, "graph", lambda self, _options: self.compiling.graph)
    with fake_graphs.installed() as found:
        yield found


@pytest.fixture
def after_step(monkeypatch) -> Callable[[int, Callable[[Any], None]], None]:
    """Has something happen to the run's ``Runner`` after its forward of that number (from 1)."""
    from para_core.execution.runner import Runner

    def arrange(number: int, happens: Callable[[Any], None]) -> None:
        original, seen = Runner.run, []

        def run(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            seen.append(1)
            if len(seen) == number:
                happens(self)
            return result

        monkeypatch.setattr(Runner, "run", run)

    return arrange


def settings(mode: str, threshold: float = 0.0) -> list[Any]:
    from para_core.settings import Cache, Compile

    return [Compile(mode), *([Cache(threshold)] if threshold else [])]


def left(card: fake_graphs.Card) -> int:
    gc.collect()
    return len(card.alive)


@pytest.mark.parametrize("kind", ["flux_small", "wan"])
def test_replays_give_what_stock_gives_and_leave_no_capture(card, after_step, kind):
    runners: list[Any] = []  # not left to the garbage collector
    after_step(1, runners.append)
    job = JOB.but(kind=kind, size=(9, 14) if kind != "wan" else (2, 9, 14), steps=4)
    stock = inprocess.sample(inprocess.load(kind), job)
    latent, report = inprocess.run(inprocess.load(kind), job, *settings("graph"))
    assert inprocess.error(latent, stock) <= 1e-6
    assert report["replays"] == 3 and card.begun == 1 and report["notes"] == []
    assert not left(card) and len(runners) == 1


def test_with_a_cache_a_hit_replays_the_ends_only(card):
    model = inprocess.load("flux_small")
    eager, expected = inprocess.run(model, JOB, *settings("off", 0.5))
    latent, report = inprocess.run(model, JOB, *settings("graph", 0.5))
    assert expected["cached"] == report["cached"] > 0 and expected["changes"] == report["changes"]
    assert inprocess.error(latent, eager) <= 1e-6
    assert card.begun == 3 and card.replayed == 3 * report["replays"] - sum(hit for _, _, hit in report["changes"][1:])
    assert not left(card)


def test_other_attention_kernels_drop_captures_in_the_middle_of_a_run(card, after_step):
    alive: list[int] = []

    def change(runner: Any) -> None:
        alive.append(left(card))
        runner.learn({})
        alive.append(left(card))

    after_step(3, change)
    model = inprocess.load("flux_small")
    latent, report = inprocess.run(model, JOB, *settings("graph"))
    assert alive == [1, 0] and card.begun == 2 and report["replays"] == JOB.steps - 2
    assert inprocess.error(latent, inprocess.sample(model, JOB)) <= 1e-6


@pytest.mark.parametrize("kinds", [[], ["a kind"]])
def test_kernels_that_were_measured_anew_drop_captures(card, after_step, monkeypatch, kinds):
    from para_core.attention.choice import Chooser

    monkeypatch.setattr(Chooser, "measure", lambda _self, _device: kinds)
    after_step(3, lambda runner: runner.measure(torch.device("cpu")))
    _, report = inprocess.run(inprocess.load("flux_small"), JOB, *settings("graph"))
    assert card.begun == 1 + len(kinds)


def test_a_kernel_that_broke_is_replaced_in_captures_too(card, after_step, monkeypatch):
    from para_core.attention.choice import Chooser

    broken: list[int] = []
    monkeypatch.setattr(Chooser, "end_forward", lambda _self: not broken or broken.clear() is not None)
    after_step(3, lambda _runner: broken.append(1))
    model = inprocess.load("flux_small")
    latent, report = inprocess.run(model, JOB, *settings("graph"))
    assert card.begun == 2 and inprocess.error(latent, inprocess.sample(model, JOB)) <= 1e-6
    assert report["replays"] == JOB.steps + 1 - 2  # one step was computed twice


def test_a_group_that_breaks_down_takes_its_captures_along(card, monkeypatch):
    """A step alone needs the memory that those of the group hold, and NCCL keeps a communicator for as long as they live."""
    from para_core.comfy.session import Session
    from para_core.group.member import RankLost
    from para_core.sequence.mesh import Degrees

    alive: list[int] = []

    class Group:
        """In place of the session's ``Split``: one rank, and then it is lost."""

        active, used = True, Degrees()

        def __init__(self, session: Session):
            self.session, self.steps = session, 0

        def step(self, model_calls: list[Any]) -> list[Any]:
            self.steps += 1
            if self.steps == 4:
                alive.append(left(card))
                raise RankLost("rank 1 was lost")
            return [self.session.alone(call) for call in model_calls]

        def lost(self) -> int:
            return 0

        def stop(self) -> None:
            self.active = False
            alive.append(left(card))

        def make_room(self) -> None:
            alive.append(left(card))

        def shares(self) -> None:
            """As even ones are reported."""

    original = Session.open

    def opened(session: Session) -> None:
        original(session)
        session.split = Group(session)

    monkeypatch.setattr(Session, "open", opened)
    model = inprocess.load("flux_small")
    latent, report = inprocess.run(model, JOB, *settings("graph"))
    assert "rank 1 was lost" in report["notes"][0]
    assert alive == [1, 0, 0] and card.begun == 2
    assert inprocess.error(latent, inprocess.sample(model, JOB)) <= 1e-6
