"""Wan, and the subclasses of its model."""

from __future__ import annotations

from typing import Any

import torch

from .common import HEADS, Tiny, built, given, seeded

WAN: dict[str, Any] = dict(in_dim=16, dim=72, ffn_dim=64, freq_dim=32, text_dim=40, out_dim=16, num_heads=HEADS, num_layers=4, text_len=32)


def wan_call(batch: int = 2, size: tuple[int, int, int] = (3, 6, 10), text: int = 15, **extra: Any) -> dict[str, Any]:
    return given(batch, 16, *size, scale=1000, text=text, **extra)


def wan(model_type: str = "t2v", *, heads: int = HEADS, build: dict[str, Any] | None = None, **extra: Any) -> Tiny:
    from comfy.ldm.wan.model import WanModel

    config = WAN | dict(dim=12 * heads, num_heads=heads) | (build or {})
    return seeded(built(WanModel, model_type=model_type, **config)), wan_call(**extra)


def wan_class(name: str, *, build: dict[str, Any] | None = None, module: str = "model", **extra: Any) -> Tiny:
    """A subclass of WanModel."""
    import importlib

    model = built(getattr(importlib.import_module(f"comfy.ldm.wan.{module}"), name), **WAN | (build or {}))
    if hasattr(model, "motion_encoder"):
        model.motion_encoder = Motion()
    return seeded(model), wan_call(**extra)


class Motion(torch.nn.Module):
    """Stands for the motion encoder, a large convolutional network that runs before the blocks."""

    def get_motion(self, faces: torch.Tensor) -> torch.Tensor:
        return faces.flatten(1)[:, :512]
