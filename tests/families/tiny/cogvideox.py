"""CogVideoX 1.0 and 1.5."""

from __future__ import annotations

from .common import HEADS, Tiny, built, given, seeded


def cogvideox(*, newer: bool = False) -> Tiny:
    from comfy.ldm.cogvideo.model import CogVideoXTransformer3DModel

    model = built(
        CogVideoXTransformer3DModel,
        num_attention_heads=HEADS,
        attention_head_dim=16,
        in_channels=16,
        out_channels=16,
        time_embed_dim=64,
        text_embed_dim=40,
        num_layers=3,
        sample_width=10,
        sample_height=6,
        sample_frames=9,
        patch_size=2,
        patch_size_t=2 if newer else None,
        max_text_seq_length=13,
        use_rotary_positional_embeddings=newer,
    )
    return seeded(model), given(2, 16, 3, 6, 10, scale=1000, text=13)
