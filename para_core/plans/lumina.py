"""Lumina 2, Z-Image and relatives: text, references and image arrive as one sequence, the refiners have run whole."""

from .plan import Blocks, Plan
from .rules import spans

PLAN = Plan(
    family="Lumina 2",
    special="text, references and image in one sequence",
    models=("ldm.lumina.model.NextDiT", "ldm.lumina.model.NextDiTPixelSpace"),
    stacks=(
        Blocks(
            path="layers",
            tokens={"x": ("packed",)},
            returns=(("packed",),),
            joint=("packed",),
            tables={"freqs_cis": (("packed",), 1)},
            rules={"timestep_zero_index": spans("packed")},
        ),
    ),
    streams=("packed",),
    heads="n_heads",
    options=("rope_options",),
)
