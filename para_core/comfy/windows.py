"""ComfyUI's context windows: a long video is sampled in overlapping parts, each of them one call of the model."""

from __future__ import annotations

from typing import Any

from comfy.context_windows import ContextSchedules, IndexListContextHandler

NAME = "context_window"  # the transformer option that holds the window; for code outside of the diffusion model
STILL = (ContextSchedules.STATIC_STANDARD, ContextSchedules.BATCHED)


def frames(options: dict[str, Any]) -> tuple[int, ...]:
    """The frames of a call's window, () for a call of all frames: windows share conditions, and are told apart by this."""
    return tuple(getattr(options.get(NAME), "index_list", ()))


def moving(model_options: dict[str, Any]) -> str:
    """Why steps of this run cannot be compared with each other, in words; "" if they can."""
    handler = model_options.get("context_handler")
    if handler is None:
        return ""
    if not isinstance(handler, IndexListContextHandler):
        return f"the windows of {type(handler).__name__} are not known to stay the same from step to step"
    if handler.context_schedule.name not in STILL:
        return f"context windows of the schedule {handler.context_schedule.name} move from step to step; {STILL[0]} keeps them still"
    return ""
