"""HiDream-I1: the loop appends fresh text before every block and takes it off again: text is whole between blocks."""

from .plan import Blocks, Plan

PLAN = Plan(
    family="HiDream",
    special="text is whole between blocks",
    models=("ldm.hidream.model.HiDreamImageTransformer2DModel",),
    stacks=(
        Blocks(
            path="double_stream_blocks",
            tokens={"image_tokens": ("img",), "text_tokens": ("txt",)},
            returns=(("img",), ("txt",)),
            joint=("img", "txt"),
            tables={"rope": (("img", "txt"), 1)},
        ),
        Blocks(
            path="single_stream_blocks",
            tokens={"image_tokens": ("img", "txt")},
            returns=(("img", "txt"),),
            joint=("img", "txt"),
            tables={"rope": (("img", "txt"), 1)},
        ),
    ),
    streams=("img",),
    heads="num_attention_heads",
    text="context",
    regather=("txt",),
    final="final_layer",
)
