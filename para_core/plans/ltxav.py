"""LTX-2: a video and an audio stream that attend to themselves and to each other."""

from .plan import Blocks, Plan
from .rules import compressed, guide_mask

VIDEO, AUDIO = ("video",), ("audio",)


def coupled(get) -> bool:
    """The gates between the streams read the highest timestep of all rows: elsewhere it must be every row's own.

    And by the first row's mask all are given a timestep for every frame or for every token.
    """
    timestep = get("timestep")
    streams = timestep if isinstance(timestep, (tuple, list)) else [timestep, get("a_timestep")]
    highest = [own.reshape(len(own), -1).amax(1) for own in streams if own is not None]
    mask = get("denoise_mask")
    return any(bool((own != own[0]).any()) for own in (*highest, *([] if mask is None else [mask])))


PLAN = Plan(
    family="LTX-2",
    special="two streams that attend to each other",
    models=("ldm.lightricks.av_model.LTXAVModel",),
    stacks=(
        Blocks(
            path="transformer_blocks",
            tokens={"x": (VIDEO, AUDIO)},
            returns=(VIDEO, AUDIO),
            tables={"v_pe": (VIDEO, 1), "a_pe": (AUDIO, 1), "v_cross_pe": (VIDEO, 1), "a_cross_pe": (AUDIO, 1)},
            rules={
                "v_timestep": compressed("video"),
                "v_cross_scale_shift_timestep": compressed("video"),
                "v_cross_gate_timestep": compressed("video"),
                "a_timestep": compressed("audio"),
                "a_cross_scale_shift_timestep": compressed("audio"),
                "a_cross_gate_timestep": compressed("audio"),
                "self_attention_mask": guide_mask,
            },
            exchange={
                "attn1": (VIDEO, VIDEO),
                "audio_attn1": (AUDIO, AUDIO),
                "audio_to_video_attn": (VIDEO, AUDIO),
                "video_to_audio_attn": (AUDIO, VIDEO),
            },
        ),
    ),
    streams=("video", "audio"),
    heads="audio_num_attention_heads",
    options=("run_vx", "run_ax", "a2v_cross_attn", "v2a_cross_attn", "stg_self_attn_blocks", "stg_skip_self_attn"),
    patch="patchifier.patch_size",
    fewest=lambda _model, latents, _get: latents[1].shape[2] if len(latents) > 1 else 0,  # of audio
    coupled=coupled,
)
