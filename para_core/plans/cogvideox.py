"""CogVideoX 1.0 (positions added to the tokens) and 1.5 (rotary)."""

from .plan import Blocks, Plan

PLAN = Plan(
    family="CogVideoX",
    special="positions are added to the tokens (1.0) or rotary (1.5)",
    models=("ldm.cogvideo.model.CogVideoXTransformer3DModel",),
    stacks=(
        Blocks(
            path="blocks",
            tokens={"hidden_states": ("img",), "encoder_hidden_states": ("txt",)},
            returns=(("img",), ("txt",)),
            joint=("txt", "img"),
            tables={"image_rotary_emb": (("img",), 0)},
        ),
    ),
    streams=("img",),
    heads="num_attention_heads",
    patch=("patch_size_t", "patch_size", "patch_size"),
    text="context",
    outside=0.25,
)
