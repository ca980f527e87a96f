"""Models whose tokens are not cut, but whose batch rows do not know of each other: those go to different ranks.

Ernie-Image could be cut like Lumina 2, but its blocks are given no transformer options: no way to their attention.
"""

from .plan import Plan


def decline(model) -> str:
    """In a video U-Net the batch rows are the frames of one video."""
    kinds = {type(module).__name__ for module in model.modules()}
    video = kinds & {"VideoResBlock", "SpatialVideoTransformer"}
    return "The batch rows of this U-Net are the frames of a video" if video else ""


PLAN = Plan(
    family="U-Net or other model without a plan",
    models=("diffusionmodules.openaimodel.UNetModel", "ldm.aura.mmdit.MMDiT", "ldm.ernie.model.ErnieImageModel"),
    stacks=(),
    streams=(),
    options=("rope_options",),  # Ernie-Image's
    decline=decline,
)
