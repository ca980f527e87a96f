"""Named settings of First Block Cache, for who does not want to choose numbers."""

from __future__ import annotations

from ..settings import Cache

FEW_STEPS = 10
"""Runs of at most so many steps (distilled models) are not cached: each step is a large part of the way."""

PRESETS = {"quality": Cache(0.05), "balanced": Cache(0.08), "fast": Cache(0.12)}
