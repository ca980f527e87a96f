"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from .common import Tiny, built, given, noise, residuals, seeded


def sd3(*, twice: bool = False, control: bool = False) -> Tiny:
    """`twice`: the first blocks attend to the image a second time, as in 3.5 medium."""
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 40, "out_features": 192}}
    model = built(
        OpenAISignatureMMDITWrapper,
        input_size=None,
        patch_size=2,
        in_channels=16,
        depth=3,
        mlp_ratio=2.0,
        adm_in_channels=24,
        context_embedder_config=embedder,
        num_patches=1024,
        pos_embed_max_size=32,
        qk_norm="rms",
        x_block_self_attn_layers=[0, 1] if twice else [],
    )
    call = given(2, 16, 10, 14, scale=1000, y=noise(2, 24, seed=3))
    if control:
        call["control"] = residuals({"output": [True, True]}, 35, 192)
    return seeded(model), call
