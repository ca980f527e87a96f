"""MiniMax-H3."""

from __future__ import annotations

from typing import Any

import torch

from .common import HEADS, WIDTH, Tiny, built, noise, seeded, times


def minimax(*, condition: bool = False) -> Tiny:
    from comfy.ldm.minimax.model import MiniMaxH3Model

    model = built(
        MiniMaxH3Model,
        hidden_size=WIDTH,
        num_layers=3,
        token_refiner_num_layers=1,
        num_attention_heads=HEADS,
        attention_head_dim=16,
        ffn_hidden_size=64,
        text_dim=40,
        timestep_input_dim=32,
        time_embed_hidden_size=48,
        time_embed_dim=24,
        rope_inv_freq_len=2,
    )
    payload: dict[str, Any] = {"text_token_tags": torch.tensor([1] * 4 + [0] * 3 + [1] * 4)}
    if condition:
        frame = noise(1, 24, 1, 6, 10, seed=8)
        payload |= dict(keyframes=[{"resolved_frame_index": 0, "latent": frame}], cond_video_latents=[frame])
    latents = [noise(1, 24, 3, 6, 10), noise(1, 32, 2, 7, seed=7)]
    return seeded(model), dict(x=latents, timestep=times(1, 1000), context=noise(1, 11, 40, seed=2), minimax_payload=payload)
