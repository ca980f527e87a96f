"""Stable Diffusion 3 and 3.5: joint blocks; those of 3.5 medium attend a second time, to the image alone."""

from .plan import Blocks, Plan

PLAN = Plan(
    family="Stable Diffusion 3",
    special="3.5 medium attends to the image a second time",
    models=("ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper",),
    stacks=(
        Blocks(
            path="joint_blocks",
            tokens={"context": ("txt",), "x": ("img",)},
            returns=(("txt",), ("img",)),
            joint=(("txt", "img"), ("img",)),
            names=("context", "x"),
        ),
    ),
    streams=("img",),
    heads="num_heads",
    text="context",
    control=True,
)
