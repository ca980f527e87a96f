"""OmniGen2."""

from __future__ import annotations

from typing import Any

from .common import HEADS, WIDTH, Tiny, built, given, seeded


def omnigen(**extra: Any) -> Tiny:
    from comfy.ldm.omnigen.omnigen2 import OmniGen2Transformer2DModel

    model = built(
        OmniGen2Transformer2DModel,
        patch_size=2,
        in_channels=16,
        hidden_size=WIDTH,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=HEADS,
        num_kv_heads=2,
        multiple_of=32,
        axes_dim_rope=(4, 6, 6),
        text_feat_dim=40,
    )
    return seeded(model), given(2, 16, 10, 14, num_tokens=11, **extra)
