"""Kernels that are timed against each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from para_core.attention.contest import WARM, contest, figures

POWER = {"first": 1.0, "second": 1.0, "third": 0.2, "fourth": 0.0}
"""Of kernels that take the same time at the same clock, the first two at any."""


def test_equal_kernels_take_equal_time_though_each_slows_down_what_comes_after_it():
    calls: dict[str, Callable[[], object]] = {name: lambda name=name: name for name in POWER}
    heat = 0.0

    def laps(turns: Sequence[Callable[[], object]]) -> list[float]:
        nonlocal heat
        found = []
        for turn in turns:
            found.append(10.0 * (1.0 + 0.2 * heat))
            heat = 0.4 * heat + 0.6 * POWER[str(turn())]
        return found

    found = figures(contest(calls, laps, spent=2000.0))
    assert found["second"] == pytest.approx(found["first"], rel=0.01)


def test_rounds_before_the_card_is_warm_do_not_count():
    passed = 0.0

    def laps(turns: Sequence[Callable[[], object]]) -> list[float]:
        nonlocal passed
        found = []
        for _ in turns:
            found.append(10.0 if passed > WARM else 5.0)
            passed += found[-1]
        return found

    assert set(contest({"one": str, "other": str}, laps)["one"]) == {10.0}
