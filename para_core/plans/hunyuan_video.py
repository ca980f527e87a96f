"""HunyuanVideo 1.0 and 1.5, HunyuanImage: the blocks of FLUX over video tokens, a reference latent's tokens first."""

import inspect

from .plan import Blocks, Plan
from .rules import ranges


def decline(model) -> str:
    """Until ComfyUI 0.3 the joint sequence was [image, text], and blocks had a flag for it."""
    flags = inspect.signature(type(model.double_blocks[0]).__init__).parameters
    return "This ComfyUI joins image and text of HunyuanVideo in the old order" if "flipped_img_txt" in flags else ""


PLAN = Plan(
    family="HunyuanVideo",
    models=("ldm.hunyuan_video.model.HunyuanVideo",),
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
            rules={"modulation_dims": ranges(("txt", "img"))},  # stock code counts them from the first text token
        ),
    ),
    streams=("img",),
    heads="num_heads",
    text="context",
    control=True,
    decline=decline,
)
