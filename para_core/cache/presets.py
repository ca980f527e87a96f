"""Named settings of the step cache, for who does not want to choose numbers."""

from __future__ import annotations

from ..settings import Cache

FEW_STEPS = 8
"""Runs of at most so many steps (distilled models) are not cached: each step is a large part of the way."""

START = 0.2
"""The first fifth of the way is always computed: it decides what picture it becomes, and errors there are the large ones."""

PRESETS = {
    "quality": Cache(0.25, START, rule="forecast"),
    "balanced": Cache(0.5, START, rule="forecast"),
    "fast": Cache(1.2, START, rule="forecast"),
}
