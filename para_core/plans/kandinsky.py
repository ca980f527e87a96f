"""Kandinsky 5: one stream of image or video tokens, text by cross-attention."""

from .plan import Blocks, Plan

PLAN = Plan(
    family="Kandinsky 5",
    special="text by cross-attention, refined whole before the blocks",
    models=("ldm.kandinsky5.model.Kandinsky5",),
    stacks=(
        Blocks(
            path="visual_transformer_blocks",
            tokens={"visual_embed": ("img",)},
            returns=(("img",),),
            joint=("img",),
            tables={"freqs": (("img",), 1)},
            exchange=("self_attention",),
            crosses=("cross_attention",),
        ),
    ),
    streams=("img",),
    options=("rope_options",),
    heads="visual_transformer_blocks.0.self_attention.num_heads",
)
