"""Chroma and Chroma Radiance: the blocks of FLUX, modulated by one vector a block."""

from .flux import stacks
from .plan import Plan

PLAN = Plan(
    family="Chroma",
    special="every block has a modulation vector of its own",
    models=("ldm.chroma.model.Chroma", "ldm.chroma_radiance.model.ChromaRadiance"),
    stacks=stacks(),
    streams=("img",),
    heads="num_heads",
    text="context",
    options=("chroma_radiance_options",),
    control=True,
)
