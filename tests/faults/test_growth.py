"""Prompts of changing sizes leave nothing behind, on the first rank or in a sidecar."""

from __future__ import annotations

import gc
import json
import logging
import random
import weakref

import pytest
from faults.counts import count
from faults.sampling import scripts
from faults.test_life import within
from parity.inprocess import Job, attached, load, run, sample

from para_core.settings import Attention, Cache, Parallel

GROWTH = 12 * 2**20  # bytes a process


def job(dice: random.Random) -> Job:
    """A prompt of another size; every fourth or so with two prompts of different lengths."""
    kind = dice.choice(("flux", "wan"))
    size = tuple(dice.randint(5, 12) for _ in range(2))
    tokens = (dice.randint(3, 12), dice.randint(3, 12))
    return Job(kind, size if kind == "flux" else (3, *size), cfg=dice.choice((1.0, 1.0, 5.0)), steps=2, tokens=tokens)


@pytest.mark.parametrize(("warm", "prompts"), [(5, 5), pytest.param(12, 100, marks=pytest.mark.slow)])
def test_memory_and_objects_do_not_grow_over_prompts_of_changing_sizes(
    group_running, tmp_path, monkeypatch, warm: int, prompts: int, record_property
) -> None:
    counts = tmp_path / "counts"
    monkeypatch.setenv("COUNTS", str(counts))
    group_running(scripts() / "counting_sidecar.py")
    monkeypatch.setattr(logging.getLogger("paradit"), "propagate", False)  # pytest keeps what is logged
    dice = random.Random(7)

    def both(number: int) -> tuple[dict, dict]:
        """What the two processes hold after so many prompts more."""
        for index in range(number):
            if index == number - 1:
                counts.write_text("")
            report = run(load((one := job(dice)).kind), one, Parallel(2), Cache(0.05), Attention("exact"))[1]
            assert report["ranks"] == 2 and report["notes"] == []
        assert within(30, lambda: counts.stat().st_size)
        return count(), json.loads(counts.read_text())

    before, after = both(warm), both(prompts)
    grown = {name: new["memory"] - old["memory"] for name, old, new in zip(("rank 0", "sidecar"), before, after, strict=True)}
    record_property("bytes grown", grown)
    for old, new in zip(before, after, strict=True):
        assert more(old["objects"], new["objects"]) == {}
    assert max(grown.values()) < GROWTH, grown


def more(old: dict[str, int], new: dict[str, int]) -> dict[str, tuple[int, int]]:
    """What there are more of, with the numbers before and after."""
    return {name: (old.get(name, 0), number) for name, number in new.items() if number > old.get(name, 0)}


def test_nothing_keeps_a_nodes_model_after_its_run(group) -> None:
    """Not even until Python looks for circles: ComfyUI would take it for a leak, and not unload the weights behind it."""
    for settings in ((Cache(0.05),), (Parallel(2),), (Parallel(2), Cache(0.05), Attention("exact"))):
        model = attached(load("flux"), *settings)
        known = weakref.ref(model)
        gc.disable()
        try:
            sample(model, Job(cfg=5.0, tokens=(11, 7)))
            del model
            assert known() is None, settings
        finally:
            gc.enable()
