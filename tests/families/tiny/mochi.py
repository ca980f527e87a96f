"""Mochi."""

from __future__ import annotations

import torch

from .common import HEADS, WIDTH, Tiny, built, given, seeded


def mochi(*, tokens: int = 11) -> Tiny:
    from comfy.ldm.genmo.joint_model.asymm_models_joint import AsymmDiTJoint

    model = built(
        AsymmDiTJoint,
        depth=3,
        patch_size=2,
        num_heads=HEADS,
        hidden_size_x=WIDTH,
        hidden_size_y=48,
        mlp_ratio_x=128.0,
        mlp_ratio_y=4.0,
        learn_sigma=False,
        in_channels=12,
        qk_norm=True,
        qkv_bias=False,
        out_bias=True,
        attn_drop=0.0,
        patch_embed_bias=True,
        posenc_preserve_area=True,
        timestep_mlp_bias=True,
        attend_to_padding=False,
        timestep_scale=1000.0,
        use_t5=True,
        t5_feat_dim=40,
        t5_token_length=16,
        rope_theta=10000.0,
    )
    held = (torch.arange(16)[None] < tokens).repeat(2, 1)
    return seeded(model), given(2, 12, 3, 6, 10, text=16, attention_mask=held, num_tokens=tokens)
