"""HiDream-I1."""

from __future__ import annotations

from .common import HEADS, Tiny, built, noise, seeded, times


def hidream() -> Tiny:
    from comfy.ldm.hidream.model import HiDreamImageTransformer2DModel

    model = built(
        HiDreamImageTransformer2DModel,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=HEADS,
        caption_channels=[40, 44],
        text_emb_dim=24,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(32, 32),
        llama_layers=[0, 1, 2, 0, 1],
    )
    call = dict(x=noise(2, 16, 10, 14), timestep=times(2, 1000), y=noise(2, 24, seed=3), context=noise(2, 7, 40, seed=2))
    return seeded(model), call | dict(encoder_hidden_states_llama3=noise(2, 3, 5, 44, seed=4))
