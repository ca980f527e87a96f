"""FLUX.1 (dev, schnell, Kontext, Fill) and FLUX.2: double blocks, then single blocks on the joined [text, image]."""

from collections.abc import Mapping

from .plan import Blocks, Plan, Rule
from .rules import ranges

Rules = Mapping[str, Rule]


def stacks(*, image: Rules | None = None, joined: Rules | None = None) -> tuple[Blocks, Blocks]:
    """FLUX's two lists of blocks, which several families build on; ``image``, ``joined``: their rules."""
    both = ("txt", "img")
    tables = {"pe": (both, 2)}
    return (
        Blocks(
            path="double_blocks",
            tokens={"img": ("img",), "txt": ("txt",)},
            returns=(("img",), ("txt",)),
            joint=both,
            tables=tables,
            rules=image or {},
        ),
        Blocks(
            path="single_blocks",
            tokens={"x": both},
            returns=(both,),
            joint=both,
            tables=tables,
            rules=joined or {},
        ),
    )


PLAN = Plan(
    family="FLUX",
    special="references follow the picture; ranges of tokens with another timestep",
    models=("ldm.flux.model.Flux",),
    stacks=stacks(
        image={"modulation_dims_img": ranges(("img",))},
        joined={"modulation_dims": ranges(("txt", "img"), shifted_by_local="txt")},
    ),
    streams=("img",),
    heads="num_heads",
    options=("rope_options",),
    text="context",
    control=True,
    outside=0.3,
)
