"""FLUX.1 (dev, schnell, Kontext, Fill) and FLUX.2: double blocks, then single blocks on the joined [text, image]."""

from .plan import Blocks, Plan
from .rules import ranges

PLAN = Plan(
    family="FLUX",
    models=("ldm.flux.model.Flux",),
    stacks=(
        Blocks(
            path="double_blocks",
            tokens={"img": ("img",), "txt": ("txt",)},
            returns=(("img",), ("txt",)),
            joint=("txt", "img"),
            tables={"pe": (("txt", "img"), 2)},
            rules={"modulation_dims_img": ranges(("img",))},
        ),
        Blocks(
            path="single_blocks",
            tokens={"x": ("txt", "img")},
            returns=(("txt", "img"),),
            joint=("txt", "img"),
            tables={"pe": (("txt", "img"), 2)},
            rules={"modulation_dims": ranges(("txt", "img"), shifted_by_local="txt")},
        ),
    ),
    streams=("img",),
    heads="num_heads",
    options=("rope_options",),
    text="context",
    control=True,
)
