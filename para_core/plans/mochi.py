"""Mochi: image and text streams; padding of the text is left out of attention."""

from .plan import Blocks, Plan
from .rules import crop

PLAN = Plan(
    family="Mochi",
    special="padding of the text is left out of attention",
    models=("ldm.genmo.joint_model.asymm_models_joint.AsymmDiTJoint",),
    stacks=(
        Blocks(
            path="blocks",
            tokens={"x": ("img",), "y": ("txt",)},
            returns=(("img",), ("txt",)),
            joint=("img", "txt"),
            tables={"rope_cos": (("img",), 0), "rope_sin": (("img",), 0)},
            rules={"crop_y": crop("txt")},
        ),
    ),
    streams=("img",),
    heads="num_heads",
    text="context",
    outside=0.36,
)
