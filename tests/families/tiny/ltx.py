"""LTX-Video and LTX-2."""

from __future__ import annotations

from typing import Any

import torch

from .common import HEADS, WIDTH, Tiny, built, given, noise, seeded, times


def ltxv(*, channels: int = 16, build: dict[str, Any] | None = None, **extra: Any) -> Tiny:
    from comfy.ldm.lightricks.model import LTXVModel

    model = built(
        LTXVModel,
        in_channels=channels,
        cross_attention_dim=WIDTH,
        attention_head_dim=16,
        num_attention_heads=HEADS,
        caption_channels=40,
        num_layers=3,
        timestep_scale_multiplier=1000.0,
        **(build or {}),
    )
    return seeded(model), given(2, channels, 3, 3, 5, **dict(timestep=times(2)[:, None], attention_mask=None) | extra)


def keyframes(strength: float | None = None) -> dict[str, Any]:
    """Two of the last frame's tokens are dropped; guides may be weaker than the rest."""
    kept = torch.ones(2, 16, 3, 3, 5)
    kept[:, :, 2, 0, :2] = -1
    call: dict[str, Any] = dict(denoise_mask=kept, keyframe_idxs=torch.zeros(2, 3, 15, 2), timestep=torch.rand(2, 45).sort().values)
    if strength is not None:
        call["guide_attention_entries"] = [{"pre_filter_count": 15, "strength": strength, "pixel_mask": None, "latent_shape": None}]
    return call


def ltxav(*, channels: int = 16, audio: int = 13, build: dict[str, Any] | None = None, **extra: Any) -> Tiny:
    from comfy.ldm.lightricks.av_model import LTXAVModel

    model = built(
        LTXAVModel,
        in_channels=channels,
        audio_in_channels=128,
        cross_attention_dim=WIDTH,
        audio_cross_attention_dim=64,
        attention_head_dim=16,
        audio_attention_head_dim=16,
        num_attention_heads=HEADS,
        audio_num_attention_heads=4,
        caption_channels=40,
        num_layers=3,
        use_middle_indices_grid=True,
        connector_num_attention_heads=2,
        connector_attention_head_dim=16,
        connector_num_layers=1,
        **(build or {}),
    )
    latents = [noise(2, channels, 3, 3, 5), noise(2, 8, audio, 16, seed=7)]
    return seeded(model), dict(x=latents, timestep=times(2)[:, None], context=noise(2, 11, 80, seed=2), attention_mask=None) | extra


def each_frame() -> tuple[torch.Tensor, torch.Tensor]:
    """Timesteps of LTX-2: one a video frame, one an audio token."""
    return times(6).view(2, 3).repeat_interleave(15, 1), times(26).view(2, 13)
