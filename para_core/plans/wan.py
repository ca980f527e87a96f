"""Wan 2.1 and 2.2: one stream, text by cross-attention. What is concatenated to the stream is cut with it."""

from dataclasses import replace

from .plan import Blocks, Plan
from .rules import frames, per_frame, whole_frames

IMG = ("img",)
BLOCKS = Blocks(
    path="blocks",
    tokens={"x": IMG},
    returns=(IMG,),
    joint=IMG,
    tables={"freqs": (IMG, 1)},
    rules={"e": frames("img")},
    exchange=("self_attn",),
    crosses=("cross_attn",),
)
PLAN = Plan(
    family="Wan",
    special="text by cross-attention; a timestep for every frame; S2V, Animate, WanDancer: tokens whole between blocks",
    models=tuple(f"ldm.wan.model.{name}" for name in ("WanModel", "CameraWanModel", "SCAILWanModel", "SCAIL2WanModel")),
    stacks=(BLOCKS,),
    streams=("img",),
    heads="num_heads",
    options=("rope_options",),
    # nothing is saved where every row holds its frame's modulation (TI2V) or convolutions look at a camera's path
    outside=lambda model: 1.0 if model.in_dim == 48 or type(model).__name__ == "CameraWanModel" else 0.42,
)


def decline_vace(model) -> str:
    """A control block after the last block would be added to tokens that are gathered by then."""
    last = len(model.blocks) - 1
    return "VACE blocks follow the last block of this Wan VACE" if last in model.vace_layers_mapping else ""


VACE = replace(
    PLAN,
    family="Wan VACE",
    models=("ldm.wan.model.VaceWanModel",),
    special="control blocks run beside the others",
    stacks=(BLOCKS, replace(BLOCKS, path="vace_blocks", tokens={"c": IMG, "x": IMG}, returns=(IMG, IMG), side=True)),
    decline=decline_vace,
)
RULES = {**BLOCKS.rules, "audio": per_frame("img", 16)}
HUMO = replace(
    PLAN,
    family="Wan HuMo",
    special="audio belongs to a frame, inside the blocks: shards end where frames do",
    models=("ldm.wan.model.HumoWanModel",),
    stacks=(replace(BLOCKS, rules=RULES, units={"img": whole_frames("audio", 16)}, crosses=()),),
    fewest=lambda _model, latents, get: 0 if get("audio_embed") is None else latents[0].shape[2],  # frames
)
# between the blocks of these, adapters work on all tokens, frame by frame
WHOLE = replace(
    PLAN,
    models=("wan.model.WanModel_S2V", "wan.model_animate.AnimateWanModel", "wan.model_wandancer.WanDancerModel"),
    borders="whole",
)
