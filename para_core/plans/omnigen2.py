"""OmniGen2: text, references and image arrive as one sequence, the refiners have run whole."""

from .plan import Blocks, Plan

PLAN = Plan(
    family="OmniGen2",
    special="text, references and image in one sequence",
    models=("ldm.omnigen.omnigen2.OmniGen2Transformer2DModel",),
    stacks=(
        Blocks(
            path="layers",
            tokens={"hidden_states": ("packed",)},
            returns=(("packed",),),
            joint=("packed",),
            tables={"image_rotary_emb": (("packed",), 1)},
        ),
    ),
    streams=("packed",),
    heads="layers.0.attn.heads",
)
