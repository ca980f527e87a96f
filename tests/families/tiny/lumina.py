"""Lumina 2 and Z-Image."""

from __future__ import annotations

from typing import Any

from .common import HEADS, WIDTH, Tiny, built, given, seeded


def lumina(*, z_image: bool = False, pixels: bool = False, batch: int = 2, **extra: Any) -> Tiny:
    """`pixels`: the variant without a VAE, whose last layers work on pixels."""
    from comfy.ldm.lumina.model import NextDiT, NextDiTPixelSpace

    model = built(
        NextDiTPixelSpace if pixels else NextDiT,
        patch_size=2,
        in_channels=16,
        dim=288 if z_image else WIDTH,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=HEADS,
        n_kv_heads=HEADS if z_image else 2,
        multiple_of=32,
        ffn_dim_multiplier=2.0,
        norm_eps=1e-5,
        qk_norm=True,
        cap_feat_dim=40,
        axes_dims=(16, 16, 16) if z_image else (4, 6, 6),
        axes_lens=(300, 512, 512),
        z_image_modulation=z_image,
        pad_tokens_multiple=8 if z_image else None,
        time_scale=1000.0 if z_image else 1.0,
        **(dict(decoder_hidden_size=32, decoder_num_res_blocks=1) if pixels else {}),
    )
    return seeded(model), given(batch, 16, 10, 14, num_tokens=11, **extra)
