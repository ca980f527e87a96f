"""LTX-Video: one stream, text by cross-attention; guide strengths become a mask over all tokens."""

from .plan import Blocks, Plan
from .rules import guide_mask

PLAN = Plan(
    family="LTX-Video",
    special="a timestep for every token; guide strengths become a mask",
    models=("ldm.lightricks.model.LTXVModel",),
    stacks=(
        Blocks(
            path="transformer_blocks",
            tokens={"x": ("img",)},
            returns=(("img",),),
            joint=("img",),
            tables={"pe": (("img",), 1), "timestep": (("img",), 1)},
            rules={"self_attention_mask": guide_mask},
            exchange=("attn1",),
            crosses=("attn2",),
        ),
    ),
    streams=("img",),
    heads="num_attention_heads",
    patch="patchifier.patch_size",
    options=("stg_self_attn_blocks", "stg_skip_self_attn"),
    outside=0.55,
)
