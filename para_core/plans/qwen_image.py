"""Qwen-Image and Qwen-Image-Edit; a mask of the text is built inside the attention, from local rows."""

from .plan import Blocks, Plan
from .rules import index

PLAN = Plan(
    family="Qwen-Image",
    special="references at timestep zero; a mask of the text is built inside the attention",
    models=("ldm.qwen_image.model.QwenImageTransformer2DModel",),
    stacks=(
        Blocks(
            path="transformer_blocks",
            tokens={"hidden_states": ("img",), "encoder_hidden_states": ("txt",)},
            returns=(("txt",), ("img",)),
            joint=("txt", "img"),
            tables={"image_rotary_emb": (("txt", "img"), 2), "encoder_hidden_states_mask": (("txt",), -1)},
            rules={"timestep_zero_index": index("img")},
        ),
    ),
    streams=("img",),
    heads="transformer_blocks.0.num_attention_heads",
    text="context",
    control=True,
    outside=0.32,
)
