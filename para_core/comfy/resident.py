"""Conditions stay on the device for a whole run.

Stock ComfyUI keeps text embeddings and the like on the host, and copies them to the device in every step. A copy from ordinary
host memory waits for all that the device was given before: each step's launch then begins only when the step before has ended.
"""

from __future__ import annotations

from typing import Any

import comfy.conds
import torch


def keep(conditions: dict[str, list[dict[str, Any]]], device: torch.device) -> None:
    """Have what the model is told of every condition be on ``device``: a guider's conditions, as prepared for this run."""
    for own in conditions.values():
        for condition in own or ():
            told = condition.get("model_conds", {})
            for name, held in told.items():
                if isinstance(held, comfy.conds.CONDRegular) and not isinstance(held, comfy.conds.CONDConstant):
                    told[name] = held._copy_with(moved(held.cond, device))


def moved(value: Any, device: torch.device) -> Any:
    """A tensor, or a list of such, on ``device``; anything else as it is."""
    if isinstance(value, list):
        return [moved(item, device) for item in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value
