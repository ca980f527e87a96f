"""What ``ParaAccelerate`` sets for a run, by machine, model and number of steps. A node that sets one of these itself wins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy.model_patcher import ModelPatcher

from ..cache.presets import FEW_STEPS, PRESETS
from ..settings import Accelerate, Attention, Cache, Parallel
from . import compiling


def fill(settings: dict[str, Any], patcher: ModelPatcher, *, steps: int, say: Callable[[str], None]) -> dict[str, Any]:
    """``settings`` by kind, with what the Accelerate among them chooses for those that no node has set."""
    wish: Accelerate | None = settings.get("Accelerate")
    if wish is None:
        return settings
    chosen: dict[str, Any] = {"Parallel": Parallel(wish.gpus, careful=True), "Attention": Attention(wish.attention)}
    if wish.compile == "auto":
        chosen["Compile"] = compiling.chosen(patcher)
    if "Cache" not in settings and (cache := caching(wish.cache, steps, say)) is not None:
        chosen["Cache"] = cache
    return {**chosen, **settings}


def caching(preset: str, steps: int, say: Callable[[str], None]) -> Cache | None:
    """The cache of a preset, None for "off" and for a run of few steps, in which each one matters."""
    if preset == "off":
        return None
    if steps <= FEW_STEPS:
        say(f"No step is cached: in a run of {FEW_STEPS} steps or fewer each one counts, and this one has {steps}.")
        return None
    return PRESETS[preset]
