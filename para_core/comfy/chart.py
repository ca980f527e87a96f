"""A run's report as a picture: what the cache judged each step by, which were cached, and how long each took.

Made to be read at the width of a node (about 400 px), so there are few words, and they are large.
"""

from __future__ import annotations

import math
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .wording import cached

SIZE = (832, 624)  # pixels; nodes show it at about half of that
SCALE = 2  # drawn larger and shrunk, for smooth edges
LEFT, RIGHT, TOP, BOTTOM = 96, 24, 96, 44  # margins of the plots
GAP = 62  # between the two plots
BACKGROUND, GRID, FAINT, TEXT = (28, 30, 34), (58, 62, 70), (150, 156, 166), (232, 234, 238)
COMPUTED, CACHED, LIMIT = (108, 160, 232), (112, 214, 142), (242, 152, 92)

MEASURES = {"classic": "change of the first block", "forecast": "expected error since a computed step, %"}

Box = tuple[float, float, float, float]


class _Canvas:
    """Drawing in pixels of the final picture."""

    def __init__(self) -> None:
        self.picture = Image.new("RGB", (SIZE[0] * SCALE, SIZE[1] * SCALE), BACKGROUND)
        self.draw = ImageDraw.Draw(self.picture)

    def box(self, box: Box, fill: tuple[int, int, int]) -> None:
        """At least one pixel wide and high."""
        x0, y0, x1, y1 = (round(value * SCALE) for value in box)
        self.draw.rectangle((x0, y0, max(x0 + SCALE, x1) - 1, max(y0 + SCALE, y1) - 1), fill)

    def dot(self, x: float, y: float, radius: float, fill: tuple[int, int, int], *, above: bool = False) -> None:
        """A round mark; ``above``: a triangle, for what lies outside of the plot."""
        x, y, radius = x * SCALE, y * SCALE, radius * SCALE
        if above:
            self.draw.polygon([(x - radius, y + radius), (x + radius, y + radius), (x, y - radius)], fill)
        else:
            self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill)

    def text(self, x: float, y: float, words: str, size: int, fill: tuple[int, int, int] = TEXT, anchor: str = "la") -> float:
        """Returns where the words end."""
        font = ImageFont.load_default(size * SCALE)
        self.draw.text((x * SCALE, y * SCALE), words, fill, font, anchor)
        return x + self.draw.textlength(words, font) / SCALE

    def image(self) -> torch.Tensor:
        """``(H, W, 3)``, float32 in 0..1, on the CPU."""
        return torch.from_numpy(np.asarray(self.picture.resize(SIZE, Image.Resampling.LANCZOS), np.float32) / 255)


def empty(sentence: str) -> torch.Tensor:
    """A picture ``(H, W, 3)``, float32 in 0..1, that says why there is no chart."""
    canvas = _Canvas()
    canvas.text(SIZE[0] / 2, 60, "No report", 36, anchor="ma")
    words, lines = sentence.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 48:
            lines.append("")
        lines[-1] += f"{word} "
    for number, line in enumerate(lines):
        canvas.text(SIZE[0] / 2, 150 + 44 * number, line.strip(), 28, FAINT, "ma")
    return canvas.image()


def draw(report: dict[str, Any]) -> torch.Tensor:
    """The chart of a run ``(H, W, 3)``, float32 in 0..1. Steps run from left to right; without a cache there is one plot."""
    timeline = report["timeline"]
    if not timeline:
        return empty("The model was not called in this run.")
    canvas = _Canvas()
    skipped = report["cache"] is not None
    words = [f"{report['seconds_per_step']:.3g} s/step"]
    words += [f"{report['ranks']} ranks"] if report["ranks"] > 1 else []
    words += [cached(report)] if skipped else []
    canvas.text(LEFT, 14, "   ".join(words), 32)
    if skipped:
        canvas.dot(LEFT + 10, 71, 8, COMPUTED)
        x = canvas.text(LEFT + 26, 58, "computed", 25, FAINT)
        canvas.dot(x + 38, 71, 8, CACHED)
        x = canvas.text(x + 54, 58, "cached", 25, FAINT)
        canvas.box((x + 28, 69, x + 58, 73), LIMIT)
        canvas.text(x + 66, 58, f"threshold {report['cache']['threshold']:g}", 25, FAINT)
    height = (SIZE[1] - TOP - BOTTOM - GAP) / 2
    right = SIZE[0] - RIGHT
    top = TOP + 38 if skipped else 100
    if skipped:
        upper = (LEFT, top, right, TOP + height)
        _changes(canvas, upper, timeline, report["cache"]["threshold"], MEASURES[report["cache"]["rule"]])
    lower = (LEFT, TOP + height + GAP if skipped else top, right, SIZE[1] - BOTTOM)
    _seconds(canvas, lower, timeline)
    return canvas.image()


def _column(box: Box, index: int, count: int) -> tuple[float, float]:
    """The middle and the width of a step's column."""
    width = (box[2] - box[0]) / count
    return box[0] + (index + 0.5) * width, width


def _frame(canvas: _Canvas, box: Box, name: str, top: float) -> None:
    """Name, base line, and labelled lines at round values up to ``top``."""
    canvas.text(box[0], box[1] - 38, name, 25)
    step = _round(top / 4)
    for number in range(math.floor(top / step + 1e-6) + 1):
        y = box[3] - (box[3] - box[1]) * number * step / top
        canvas.box((box[0], y - 1, box[2], y), GRID)
        canvas.text(box[0] - 10, y, f"{number * step:.3g}", 24, FAINT, "rm")


def _round(value: float) -> float:
    """The nearest 1, 2 or 5 times a power of ten that is not less."""
    power = 10 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * (1 - 1e-9))


def _colour(step: dict[str, Any]) -> tuple[int, int, int]:
    """Green if every forward of the step was cached, between green and blue if some were."""
    share = step["hits"] / step["decisions"] if step["decisions"] else 0.0
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(COMPUTED, CACHED, strict=True))
    return red, green, blue


def _changes(canvas: _Canvas, box: Box, timeline: list[dict[str, Any]], threshold: float, name: str) -> None:
    """What the cache's rule judges by against the threshold; what is far above it is a triangle at the upper edge."""
    known = [step["change"] for step in timeline if step["change"] is not None and math.isfinite(step["change"])]
    top = max(1e-6, 1.25 * threshold, min(1.1 * max(known, default=0.0), 4 * threshold))
    _frame(canvas, box, name, top)
    limit = box[3] - (box[3] - box[1]) * threshold / top
    for start in range(round(box[0]), round(box[2]), 16):
        canvas.box((start, limit - 2, min(start + 10, box[2]), limit + 2), LIMIT)
    for index, step in enumerate(timeline):
        x, width = _column(box, index, len(timeline))
        if step["change"] is not None and not math.isnan(step["change"]):
            radius = max(3.5, min(8.0, width * 0.4))
            y = box[3] - (box[3] - box[1]) * min(step["change"] / top, 1.0)
            canvas.dot(x, max(y, box[1] + radius), radius, _colour(step), above=step["change"] > top)


def _seconds(canvas: _Canvas, box: Box, timeline: list[dict[str, Any]]) -> None:
    """Seconds of every step; one that took far longer than the others is cut off, with its time written on it."""
    seconds = [step["seconds"] for step in timeline]
    usual = [step["seconds"] for step in timeline[1:] if not step["hits"]] or seconds
    top = max(1e-6, 1.1 * min(max(seconds), 2.5 * median(usual)))
    _frame(canvas, box, "seconds a step", top)
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if step * 8 >= len(timeline) or step == 1000)
    for index, step in enumerate(timeline):
        x, width = _column(box, index, len(timeline))
        half = min(60.0, max(0.5, width * 0.4))
        height = (box[3] - box[1]) * min(step["seconds"] / top, 1.0)
        canvas.box((x - half, box[3] - height, x + half, box[3]), _colour(step))
        if step["seconds"] > top:
            canvas.box((x - half, box[1] + 30, x + half, box[1] + 36), BACKGROUND)
            canvas.text(x + half + 6, box[1] - 2, f"{step['seconds']:.3g} s", 24, TEXT)
        if index == 0 or (index + 1) % every == 0:
            canvas.text(x, box[3] + 6, str(index + 1), 24, FAINT, "ma")
    canvas.text(box[0] - 10, box[3] + 6, "step", 24, FAINT, "ra")
