"""Krea 2: text, image and references arrive as one sequence, the text has been refined whole."""

from .plan import Blocks, Plan
from .rules import image_slice, index

PLAN = Plan(
    family="Krea 2",
    special="text, image and references in one sequence; references at timestep zero",
    models=("ldm.krea2.model.SingleStreamDiT",),
    stacks=(
        Blocks(
            path="blocks",
            tokens={"x": ("packed",)},
            returns=(("packed",),),
            joint=("packed",),
            tables={"freqs": (("packed",), 2)},
            rules={"timestep_zero_index": index("packed"), "transformer_options": image_slice("packed")},
        ),
    ),
    streams=("packed",),
    heads="heads",
    patch="patch",
    # no `outside`: the refiner of the text, by layers, needs most of the memory where pictures are small
)
