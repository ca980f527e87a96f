"""MiniMax-H3: text, conditions, audio and video packed into one sequence, without a batch dim."""

from .plan import Blocks, Plan
from .rules import ranges

PLAN = Plan(
    family="MiniMax-H3",
    special="text, audio and video in one sequence, without a batch dim",
    models=("ldm.minimax.model.MiniMaxH3Model",),
    stacks=(
        Blocks(
            path="blocks",
            tokens={"x": ("packed",)},
            returns=(("packed",),),
            joint=("packed",),
            tables={"rope_freqs": (("packed",), 1)},
            rules={"mod_segments": ranges(("packed",))},
            dim=0,
            batch=None,
        ),
    ),
    streams=("packed",),
    heads="blocks.0.attn.heads",
    options=("minimax_h3_sigma_shift_video", "minimax_h3_sigma_shift_audio", "sample_sigmas"),
    rebuilt=("minimax_payload.layout",),
)
