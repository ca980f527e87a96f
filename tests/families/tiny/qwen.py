"""Qwen-Image."""

from __future__ import annotations

from typing import Any

from .common import HEADS, Tiny, built, given, residuals, seeded


def qwen(*, control: bool = False, **extra: Any) -> Tiny:
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    model = built(
        QwenImageTransformer2DModel,
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=HEADS,
        joint_attention_dim=40,
        axes_dims_rope=(4, 6, 6),
    )
    call = given(2, 16, 1, 10, 14, **extra)
    if control:
        call["control"] = residuals({"input": [True, False, True]}, 35)
    return seeded(model), call
