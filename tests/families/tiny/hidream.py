"""HiDream-I1."""

from __future__ import annotations

from .common import HEADS, Tiny, built, given, noise, seeded


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
    texts = dict(y=noise(2, 24, seed=3), encoder_hidden_states_llama3=noise(2, 3, 5, 44, seed=4))
    return seeded(model), given(2, 16, 10, 14, scale=1000, text=7, **texts)
