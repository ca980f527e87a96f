"""Cosmos-Predict2, Anima and Cosmos 1."""

from __future__ import annotations

from typing import Any

from .common import HEADS, WIDTH, Tiny, built, given, seeded

COSMOS: dict[str, Any] = dict(
    max_img_h=64,
    max_img_w=64,
    max_frames=16,
    in_channels=16,
    out_channels=16,
    patch_spatial=2,
    patch_temporal=1,
    concat_padding_mask=True,
    crossattn_emb_channels=40,
    model_channels=WIDTH,
    num_blocks=3,
    num_heads=HEADS,
    mlp_ratio=2.0,
    pos_emb_cls="rope3d",
    pos_emb_interpolation="crop",
    use_adaln_lora=True,
    adaln_lora_dim=32,
)


def predict2(*, extra_positions: bool = False, **extra: Any) -> Tiny:
    from comfy.ldm.cosmos.predict2 import MiniTrainDIT

    model = built(
        MiniTrainDIT, pos_emb_learnable=True, extra_per_block_abs_pos_emb=extra_positions, image_model="cosmos_predict2", **COSMOS
    )
    return seeded(model), given(2, 16, 3, 10, 14, **extra)


def anima() -> Tiny:
    from comfy.ldm.anima.model import Anima

    model = built(Anima, pos_emb_learnable=True, extra_per_block_abs_pos_emb=False, image_model="anima", **COSMOS)
    del model.llm_adapter  # large, and only used on text, before the entry method
    return seeded(model), given(2, 16, 1, 10, 14)


def cosmos1() -> Tiny:
    from comfy.ldm.cosmos.model import GeneralDIT

    model = built(
        GeneralDIT,
        block_config="FA-CA-MLP",
        block_x_format="THWBD",
        pos_emb_learnable=False,
        affline_emb_norm=True,
        extra_per_block_abs_pos_emb=True,
        extra_per_block_abs_pos_emb_type="learnable",
        image_model="cosmos",
        **COSMOS,
    )
    return seeded(model), given(2, 16, 3, 10, 14, attention_mask=None)
