"""Chroma and Chroma Radiance: the blocks of FLUX, modulated by one vector a block."""

from .plan import Blocks, Plan

PLAN = Plan(
    family="Chroma",
    models=("ldm.chroma.model.Chroma", "ldm.chroma_radiance.model.ChromaRadiance"),
    stacks=(
        Blocks(
            path="double_blocks",
            tokens={"img": ("img",), "txt": ("txt",)},
            returns=(("img",), ("txt",)),
            joint=("txt", "img"),
            tables={"pe": (("txt", "img"), 2)},
        ),
        Blocks(
            path="single_blocks",
            tokens={"x": ("txt", "img")},
            returns=(("txt", "img"),),
            joint=("txt", "img"),
            tables={"pe": (("txt", "img"), 2)},
        ),
    ),
    streams=("img",),
    heads="num_heads",
    text="context",
    control=True,
)
