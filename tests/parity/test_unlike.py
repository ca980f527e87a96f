"""Ranks of unequal speed: whole runs in shares of their own, on real processes; the rates are the tests'."""

from __future__ import annotations

from typing import Any

import pytest
from parity import inprocess

from para_core.settings import Parallel

pytestmark = pytest.mark.usefixtures("comfy")


@pytest.fixture
def orders(monkeypatch) -> list[dict[str, Any]]:
    """What rank 0 tells the others of every step."""
    from para_core.group.group import Group

    found: list[dict[str, Any]] = []
    step = Group.step
    monkeypatch.setattr(Group, "step", lambda self, order, *ahead: found.append(dict(order)) or step(self, order, *ahead))
    return found


def unlike(monkeypatch, *rates: float) -> list[str]:
    """Make the ranks cards of several kinds. Returns the dtypes that workers are asked about."""
    from para_core.execution import gain
    from para_core.group.group import Group

    asked: list[str] = []
    monkeypatch.setattr(gain, "unlike", lambda devices: len(devices) == len(rates))
    monkeypatch.setattr(gain, "matrix_rate", lambda device, dtype: rates[0])
    monkeypatch.setattr(Group, "rates", lambda self, dtype: asked.append(str(dtype)) or rates[1:])
    return asked


# both tiny models have 3 heads
@pytest.mark.parametrize(
    ("kind", "settings", "cfg", "rates", "shares"),
    [
        ("flux", Parallel(2, 1, 2, 1), 1.0, (2e9, 1e9), [67, 33]),
        ("flux", Parallel(2, 1, 1, 2), 1.0, (1e9, 2e9), [33, 67]),
        ("wan", Parallel(3, 1, 3, 1), 1.0, (2e9, 2.02e9, 1e9), [40, 40, 20]),
        ("wan", Parallel(3, 1, 1, 3), 1.0, (2e9, 1e9, 1e9), [50, 25, 25]),
        pytest.param("flux", Parallel(4, 1, 2, 2), 1.0, (2e9, 1e9, 1e9, 1e9), [40, 20, 20, 20], marks=pytest.mark.slow),
        pytest.param("flux", Parallel(4, 2, 2, 1), 5.0, (2e9, 1e9, 1e9, 1e9), [67, 33, 50, 50], marks=pytest.mark.slow),
    ],
    ids=["ulysses", "ring, slower card first", "ulysses of 3", "ring of 3", "ring of ulysses", "batch of ulysses"],
)
def test_a_run_in_shares_by_speed_equals_stock_and_says_them(monkeypatch, orders, kind, settings, cfg, rates, shares):
    from para_core.comfy import wording

    asked = unlike(monkeypatch, *rates)
    job = inprocess.Job(kind, size=(9, 14) if kind == "flux" else (2, 9, 14), cfg=cfg)
    stock = inprocess.sample(inprocess.load(kind), job)
    latent, report = inprocess.run(inprocess.load(kind), job, settings)
    assert report["notes"] == [] and report["shares"] == shares and len(asked) == 1
    assert f"tokens shared {' : '.join(map(str, shares))} by the GPUs' speed" in wording.summary(report)
    assert [len(order["speeds"]) for order in orders] == [settings.gpus] * report["forwards"]
    assert inprocess.error(latent, stock) < 1e-5


def test_a_card_is_told_the_memory_of_the_largest_share(monkeypatch):
    from para_core.comfy import split

    told: dict[str, float] = {}
    part = split.memory.part
    monkeypatch.setattr(split.memory, "part", lambda *args: told.setdefault(str(args[4]), part(*args)))
    inprocess.run(inprocess.load("flux"), inprocess.Job("flux"), Parallel(2))
    unlike(monkeypatch, 2e9, 1e9)
    inprocess.run(inprocess.load("flux"), inprocess.Job("flux"), Parallel(2))
    assert list(told) == ["None", "(1.0, 0.5)"] and told["None"] <= told["(1.0, 0.5)"]


def test_equal_cards_are_not_measured_and_told_no_speeds(monkeypatch, orders):
    """Cards of one kind; and cards of several kinds that are about as fast."""
    from para_core.execution import gain
    from para_core.group.group import Group

    for rates in (None, (1e9, 0.95e9)):
        with monkeypatch.context() as patched:
            if rates is None:
                patched.delattr(Group, "rates")
                patched.delattr(gain, "matrix_rate")
            else:
                unlike(patched, *rates)
            _, report = inprocess.run(inprocess.load("flux"), inprocess.Job("flux"), Parallel(2))
        assert report["ranks"] == 2 and report["notes"] == [] and report["shares"] is None
    assert len(orders) == 4 and not any("speeds" in order for order in orders)


def test_a_worker_that_is_lost_while_it_is_measured_leaves_the_run_on_one_gpu(monkeypatch):
    from para_core.group.group import Group
    from para_core.group.member import RankLost

    def lost(self, dtype):
        raise RankLost("rank 1 on cpu has gone")

    unlike(monkeypatch, 2e9, 1e9)
    monkeypatch.setattr(Group, "rates", lost)
    job = inprocess.Job("flux")
    latent, report = inprocess.run(inprocess.load("flux"), job, Parallel(2))
    assert report["ranks"] == 1 and report["notes"] == ["This run stays on one GPU, because rank 1 on cpu has gone."]
    assert inprocess.error(latent, inprocess.sample(inprocess.load("flux"), job)) < 1e-6
