"""Kandinsky 5."""

from __future__ import annotations

from typing import Any

from .common import WIDTH, Tiny, built, given, noise, seeded


def kandinsky(channels: int = 16, **extra: Any) -> Tiny:
    """channels: 33 for video under ComfyUI, which adds a clean clip and a mask to the latents."""
    from comfy.ldm.kandinsky5.model import Kandinsky5

    model = built(
        Kandinsky5,
        in_text_dim=40,
        in_text_dim2=24,
        time_dim=32,
        model_dim=WIDTH,
        ff_dim=64,
        visual_embed_dim=4 * channels,
        num_text_blocks=1,
        num_visual_blocks=3,
        axes_dims=(4, 6, 6),
    )
    return seeded(model), given(2, 16, 3, 6, 10, scale=1000, y=noise(2, 24, seed=3), **extra)
