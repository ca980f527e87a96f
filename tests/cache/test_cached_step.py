"""What the processor does in a cached step: few hooks, and few reads, each of which waits for the device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from parity.inprocess import Job, load, run, sample

from para_core.cache.reading import Reading
from para_core.settings import Cache, Parallel

pytestmark = pytest.mark.usefixtures("comfy")
SMALL = Job("flux_small", (9, 14), steps=6)
READS = ("tolist", "item", "__bool__", "__float__", "__int__")


def blocks(model: Any) -> list[torch.nn.Module]:
    flux = model.model.diffusion_model
    return [*flux.double_blocks, *flux.single_blocks]


def hooked(block: torch.nn.Module) -> bool:
    return any(part._forward_hooks or part._forward_pre_hooks for part in block.modules())


@pytest.mark.parametrize("ranks", [1, 2])
def test_on_one_rank_only_the_first_and_the_last_block_have_hooks(ranks: int) -> None:
    model = load("flux_small")
    found: list[list[bool]] = []
    run(model, SMALL, Cache(0.2), Parallel(ranks), callback=lambda *_: found.append([hooked(block) for block in blocks(model)]))
    inner = [ranks > 1] * (len(blocks(model)) - 2)
    assert found == [[True, *inner, True]] * SMALL.steps
    assert not any(map(hooked, blocks(model)))


def test_a_cached_step_reads_the_noise_level_and_the_sums_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("flux_small")
    reads: list[Counter] = []
    for name in READS:
        original = getattr(torch.Tensor, name)

        def read(tensor: torch.Tensor, _name: str = name, _original: Any = original) -> Any:
            if reads:
                reads[-1][_name, tuple(tensor.shape)] += 1
            return _original(tensor)

        monkeypatch.setattr(torch.Tensor, name, read)
    sample(model, SMALL, callback=lambda *_: reads.append(Counter()))
    stock = reads[:-1]
    reads = []
    _, report = run(model, SMALL, Cache(1e9), callback=lambda *_: reads.append(Counter()))
    assert report["cached"] == SMALL.steps - 1
    ours = {"tolist": 2}
    for cached, plain in zip(reads[:-1], stock, strict=True):
        assert Counter(name for name, _ in (cached - plain).elements()) == ours
    assert ("tolist", (1, 3)) in reads[0]


@pytest.mark.parametrize("threshold", [1e-9, 1e9])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_the_noise_level_is_not_asked_for_before_the_first_block_has_been_launched(
    cfg: float, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    read = Reading.__float__
    monkeypatch.setattr(Reading, "__float__", lambda level: seen.append("level") or read(level))
    model = load("flux_small")
    kind = type(blocks(model)[0])
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda block, *args, **kwargs: seen.append("block") or forward(block, *args, **kwargs))
    run(model, Job("flux_small", (9, 14), cfg=cfg, steps=6), Cache(threshold), callback=lambda *_: seen.append("step"))
    steps = " ".join(seen).split("step")[:-1]
    assert len(steps) == 6 and all(step.split()[0] == "block" and "level" in step for step in steps)


def test_what_is_read_is_what_was_there_when_reading_began() -> None:
    levels = torch.tensor([0.5, 0.25])
    reading, first = Reading(levels), Reading(levels[:1])
    levels.fill_(2.0)
    assert reading.numbers == reading.numbers == [0.5, 0.25] and float(first) == 0.5
