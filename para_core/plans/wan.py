"""Wan 2.1 and 2.2 (text to video, image to video, 5B with per-frame timesteps): one stream, text by cross-attention."""

from .plan import Blocks, Plan
from .rules import frames

PLAN = Plan(
    family="Wan",
    models=("ldm.wan.model.WanModel",),
    stacks=(
        Blocks(
            path="blocks",
            tokens={"x": ("img",)},
            returns=(("img",),),
            joint=("img",),
            tables={"freqs": (("img",), 1)},
            rules={"e": frames("img")},
            exchange=("self_attn",),
        ),
    ),
    streams=("img",),
    heads="num_heads",
    options=("rope_options",),
)
