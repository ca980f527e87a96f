"""The chart shows what the report says: looked at pixel by pixel."""

from __future__ import annotations

import math

import pytest
import torch

from para_core.cache.rule import RULES
from para_core.comfy import chart
from para_core.comfy.chart import BACKGROUND, CACHED, COMPUTED, LIMIT, SIZE


def step(seconds: float = 1.0, change: float | None = None, hits: int = 0, decisions: int = 1) -> dict:
    return {"sigma": 0.5, "seconds": seconds, "forwards": 1, "change": change, "decisions": decisions, "hits": hits}


def report(*timeline: dict, threshold: float | None = 0.1, rule: str = "classic") -> dict:
    cache = None if threshold is None else {"threshold": threshold, "predictor": "reuse", "rule": rule}
    return {"ranks": 2, "degrees": [1, 1, 2], "seconds_per_step": 1.0, "timeline": list(timeline), "cache": cache}


def where(picture: torch.Tensor, colour: tuple[int, int, int]) -> torch.Tensor:
    """(H, W): which pixels have this colour, edges apart."""
    return ((picture - torch.tensor(colour) / 255).abs() < 0.06).all(dim=2)


def lower(picture: torch.Tensor) -> torch.Tensor:
    """The rows of the second plot."""
    return picture[SIZE[1] // 2 + 40 :]


def columns(picture: torch.Tensor, steps: int) -> list[torch.Tensor]:
    """The second plot cut into one strip a step."""
    strips = lower(picture)[:, chart.LEFT : SIZE[0] - chart.RIGHT]
    return list(strips.tensor_split(steps, dim=1))


@pytest.mark.parametrize("count", [1, 2, 3, 20, 1500])
@pytest.mark.parametrize("threshold", [None, 0.1])
def test_every_length_of_run_gives_a_picture_of_one_size(count, threshold):
    picture = chart.draw(report(*(step(change=0.05 * index, hits=int(index > count // 2)) for index in range(count)), threshold=threshold))
    assert picture.shape == (SIZE[1], SIZE[0], 3) and picture.dtype == torch.float32
    assert 0.0 <= picture.min() and picture.max() <= 1.0
    assert where(picture, COMPUTED).any() and where(picture, BACKGROUND).float().mean() > 0.1
    assert where(picture, LIMIT).any() == (threshold is not None)


def test_bars_are_as_high_as_their_steps_took_and_cached_ones_have_another_colour():
    picture = chart.draw(report(step(4.0), step(2.0, 0.5), step(1.0, 0.05, hits=1), step(2.0, 0.2)))
    strips = columns(picture, 4)
    colours = [COMPUTED, COMPUTED, CACHED, COMPUTED]
    heights = [where(strip, colour).any(dim=1).sum().item() for strip, colour in zip(strips, colours, strict=True)]
    assert heights[1] == heights[3] and abs(heights[0] / heights[1] - 2) < 0.1 and abs(heights[1] / heights[2] - 2) < 0.1
    assert not any(where(strip, CACHED if colour is COMPUTED else COMPUTED).any() for strip, colour in zip(strips, colours, strict=True))


def test_a_first_step_that_took_far_longer_does_not_flatten_the_others():
    usual = chart.draw(report(step(1.0), *(step(1.0, 0.3) for _ in range(7))))
    slow = chart.draw(report(step(60.0), *(step(1.0, 0.3) for _ in range(7))))
    height, slow_height = (where(columns(picture, 8)[4], COMPUTED).any(dim=1).sum() for picture in (usual, slow))
    assert slow_height > 0.3 * height
    assert where(columns(slow, 8)[0], COMPUTED).any(dim=1).sum() > 2 * slow_height


def test_changes_lie_above_or_below_the_threshold_line_as_the_cache_saw_them():
    picture = chart.draw(report(step(), step(change=0.2), step(change=0.05, hits=1), step(change=math.inf), step(change=0.099, hits=1)))
    upper = picture[chart.TOP + 38 : SIZE[1] // 2 + 10, chart.LEFT : SIZE[0] - chart.RIGHT]
    line = where(upper, LIMIT).any(dim=1).nonzero().float().mean()
    rows = []
    for strip, colour in zip(upper.tensor_split(5, dim=1), [COMPUTED, COMPUTED, CACHED, COMPUTED, CACHED], strict=True):
        marks = where(strip, colour).any(dim=1).nonzero().float()
        rows.append(marks.mean().item() if len(marks) else None)
    assert rows[0] is None, "there was nothing to compare with"
    assert rows[3] < rows[1] < line < rows[4] < rows[2]


def test_the_upper_plot_is_named_after_what_the_rule_judges_by():
    assert set(chart.MEASURES) == set(RULES)
    pictures = [chart.draw(report(step(), step(change=0.2), rule=rule)) for rule in RULES]
    plot = chart.TOP + 38
    assert all(where(picture[plot - 40 : plot - 4], chart.TEXT).any() for picture in pictures)
    assert not torch.equal(*(picture[:plot] for picture in pictures)) and torch.equal(*(picture[plot:] for picture in pictures))


def test_a_step_of_which_a_part_was_cached_has_a_colour_between():
    strip = columns(chart.draw(report(step(1.0), step(1.0, 0.1, hits=1, decisions=2))), 2)[1]
    assert not where(strip, COMPUTED).any() and not where(strip, CACHED).any()
    between = tuple(round((a + b) / 2) for a, b in zip(COMPUTED, CACHED, strict=True))
    assert where(strip, between).any()


@pytest.mark.parametrize("odd", [step(0.0), step(1e-9, 0.0, hits=1), step(1.0, math.nan), step(1e5, 1e9)])
def test_odd_numbers_are_drawn_too(odd):
    for timeline in ([odd], [step(), odd], [odd, step(0.0, 0.0)]):
        assert chart.draw(report(*timeline)).isfinite().all()


def test_without_a_run_the_picture_says_why():
    picture = chart.empty("No sampler was found before this node.")
    assert picture.shape == (SIZE[1], SIZE[0], 3)
    assert not torch.equal(picture, chart.empty("Another sentence."))
    assert where(chart.draw(report()), BACKGROUND).any(), "a run without a forward"
