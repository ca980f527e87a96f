"""HunyuanVideo 1.0 and 1.5, HunyuanImage: the blocks of FLUX over video tokens, a reference latent's tokens first."""

import inspect

from .flux import stacks
from .plan import Plan
from .rules import ranges


def decline(model) -> str:
    """Until ComfyUI 0.3 the joint sequence was [image, text], and blocks had a flag for it."""
    flags = inspect.signature(type(model.double_blocks[0]).__init__).parameters
    return "This ComfyUI joins image and text of HunyuanVideo in the old order" if "flipped_img_txt" in flags else ""


PLAN = Plan(
    family="HunyuanVideo",
    special="a reference's tokens come first; the text is refined whole, before the blocks",
    models=("ldm.hunyuan_video.model.HunyuanVideo",),
    stacks=stacks(
        image={"modulation_dims_img": ranges(("img",))},
        joined={"modulation_dims": ranges(("txt", "img"))},  # stock code counts them from the first text token
    ),
    streams=("img",),
    heads="num_heads",
    text="context",
    control=True,
    options=("sigmas", "sample_sigmas"),
    decline=decline,
    outside=0.35,
)
