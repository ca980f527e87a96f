"""Models without a plan for their blocks: the U-Net of SDXL and of Stable Video Diffusion, AuraFlow, PixArt, Ernie-Image."""

from __future__ import annotations

from typing import Any

from .common import HEADS, WIDTH, Tiny, built, given, noise, seeded


def unet(*, video: bool = False) -> Tiny:
    """As in SDXL; `video`: as in Stable Video Diffusion, whose batch rows are the frames of a video."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config: dict[str, Any] = dict(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=32,
        num_res_blocks=[1, 1],
        channel_mult=[1, 2],
        transformer_depth=[0, 1],
        transformer_depth_output=[0, 0, 1, 1],
        transformer_depth_middle=1,
        context_dim=40,
        num_classes="sequential",
        adm_in_channels=24 + 6 * 256,
        use_linear_in_transformer=True,
        use_spatial_transformer=True,
        num_heads=-1,
        num_head_channels=16,
        legacy=False,
        use_temporal_attention=video,
        use_temporal_resblock=video,
    )
    if video:
        config |= dict(video_kernel_size=[3, 1, 1], merge_strategy="learned_with_images", extra_ff_mix_layer=True, use_spatial_context=True)
    return seeded(built(UNetModel, **config)), given(2, 4, 10, 14, scale=1000, text=7, y=noise(2, 24 + 6 * 256, seed=3))


def aura() -> Tiny:
    from comfy.ldm.aura.mmdit import MMDiT

    model = built(
        MMDiT,
        in_channels=4,
        out_channels=4,
        dim=WIDTH,
        n_layers=4,
        n_double_layers=2,
        n_heads=HEADS,
        global_conddim=WIDTH,
        cond_seq_dim=40,
        max_seq=64,
    )
    return seeded(model), given(2, 4, 10, 14, text=7)


def ernie() -> Tiny:
    from comfy.ldm.ernie.model import ErnieImageModel

    sizes = dict(hidden_size=WIDTH, num_attention_heads=HEADS, num_layers=3, ffn_hidden_size=64, text_in_dim=40, rope_axes_dim=(4, 6, 6))
    return seeded(built(ErnieImageModel, **sizes)), given(2, 128, 5, 7, scale=1000, text=7)


def pixart() -> Tiny:
    from comfy.ldm.pixart.pixartms import PixArtMS

    model = built(PixArtMS, hidden_size=WIDTH, depth=3, num_heads=HEADS, caption_channels=40, micro_condition=False, model_max_length=7)
    return seeded(model), given(2, 4, 44, 48, scale=1000, text=7)
