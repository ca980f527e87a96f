"""Cosmos-Predict2 and Anima, Cosmos 1: tokens stay a grid of frames, rows and columns, and are cut along the rows.

This file is longer than 60 lines because it holds two plans.
"""

from .plan import Blocks, Plan


def rows(model, latents, _get) -> int:
    return -(-latents[0].shape[3] // model.patch_spatial)


PREDICT2 = Plan(
    family="Cosmos-Predict2",
    special="tokens stay a grid of frames, rows and columns, and are cut along the rows",
    models=("ldm.cosmos.predict2.MiniTrainDIT", "ldm.anima.model.Anima"),
    stacks=(
        Blocks(
            path="blocks",
            tokens={"x_B_T_H_W_D": ("rows",)},
            returns=(("rows",),),
            joint=("rows",),
            tables={"rope_emb_L_1_1_D": (("rows",), 1), "extra_per_block_pos_emb": (("rows",), 2)},
            exchange=("self_attn",),
            crosses=("cross_attn",),
            dim=2,
        ),
    ),
    streams=("rows",),
    heads="num_heads",
    patch=("patch_temporal", "patch_spatial", "patch_spatial"),
    fewest=rows,
    outside=0.32,
)


def decline(model) -> str:
    """Which part of a block attends to all tokens is the checkpoint's choice; all known ones begin with it."""
    known = {block.blocks[0].block_type for block in model.blocks.values()} <= {"FA", "fa", "full_attn"}
    return "" if known else "The blocks of this Cosmos model do not begin with full attention"


PREDICT1 = Plan(
    family="Cosmos 1",
    special="as Cosmos-Predict2, with tokens whole between blocks",
    models=("ldm.cosmos.model.GeneralDIT",),
    stacks=(
        Blocks(
            path="blocks",
            tokens={"x": ("rows",)},
            returns=(("rows",),),
            joint=("rows",),
            tables={"rope_emb_L_1_1_D": (("rows",), 0)},
            exchange=("blocks.0",),
            dim=1,
            batch=3,
        ),
    ),
    streams=("rows",),
    heads="num_heads",
    patch=("patch_temporal", "patch_spatial", "patch_spatial"),
    fewest=rows,
    borders="whole",  # positions are added to all tokens before every block
    decline=decline,
)
