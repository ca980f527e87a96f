"""HunyuanVideo 1.0 and 1.5, HunyuanImage."""

from __future__ import annotations

from typing import Any

import torch

from .common import HEADS, WIDTH, Tiny, built, fields, given, noise, residuals, seeded


def hunyuan(*, batch: int = 2, newer: bool = False, image: bool = False, control: bool = False, **extra: Any) -> Tiny:
    """`newer`: 1.5; `image`: HunyuanImage, the same class with patches of two sides."""
    from comfy.ldm.hunyuan_video.model import HunyuanVideo, HunyuanVideoParams

    params = dict(
        in_channels=16,
        out_channels=16,
        vec_in_dim=None if newer else 24,
        context_in_dim=40,
        hidden_size=WIDTH,
        mlp_ratio=2.0,
        num_heads=HEADS,
        depth=2,
        depth_single_blocks=0 if newer else 3,
        axes_dim=[8, 8] if image else [4, 6, 6],
        theta=256,
        patch_size=[1, 1, 1] if newer else [2, 2] if image else [1, 2, 2],
        qkv_bias=True,
        guidance_embed=not newer,
        byt5=newer or image,
        meanflow=False,
        use_cond_type_embedding=newer,
        vision_in_dim=20 if newer else None,
        meanflow_sum=False,
    )
    model = built(HunyuanVideo, image_model="hunyuan_video", **fields(HunyuanVideoParams, params))
    sides = (3, 5, 7) if newer else (10, 14) if image else (3, 6, 10)
    vectors = dict(y=noise(batch, 24, seed=3), guidance=torch.full((batch,), 6.0))
    call = given(batch, 16, *sides, scale=1000, text=13, **vectors, **extra)
    if newer or image:
        call["txt_byt5"] = noise(batch, 5, 1472, seed=4)
    if newer:
        call["clip_fea"] = noise(batch, 7, 20, seed=5)
    if control:
        call["control"] = residuals({"input": [True] * 2, "output": [True] * 3}, 45)
    return seeded(model), call
