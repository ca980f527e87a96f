"""What is measured: configurations of real models, the latents and texts they get, and the same made tiny."""

from __future__ import annotations

from dataclasses import dataclass, replace

FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 5120,
    "ffn_dim": 13824,
    "num_heads": 40,
    "num_layers": 40,
    "patch_size": (1, 2, 2),
    "in_dim": 16,
    "out_dim": 16,
    "freq_dim": 256,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
}
HUNYUAN = {
    "image_model": "hunyuan_video",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 20,
    "depth_single_blocks": 40,
    "axes_dim": [16, 56, 56],
    "theta": 256,
    "qkv_bias": True,
    "guidance_embed": True,
    "meanflow": False,
    "meanflow_sum": False,
    "byt5": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
}
COGVIDEOX = {
    "image_model": "cogvideox",
    "num_attention_heads": 48,
    "attention_head_dim": 64,
    "in_channels": 16,
    "patch_size": 2,
    "num_layers": 42,
    "time_embed_dim": 512,
    "text_embed_dim": 4096,
    "use_rotary_positional_embeddings": True,
}


@dataclass(frozen=True)
class Case:
    """A model's configuration, the latent's shape, and text tokens x width."""

    config: dict
    latent: tuple[int, ...]
    text: tuple[int, int]
    pooled: int = 0
    steps: int = 6


CASES = {
    "flux-1024": Case(FLUX, (1, 16, 128, 128), (512, 4096), 768, steps=12),
    "flux-2048": Case(FLUX, (1, 16, 256, 256), (512, 4096), 768, steps=10),
    "wan-480p": Case(WAN, (1, 16, 21, 60, 104), (512, 4096), steps=7),
    "hunyuan-720p": Case(HUNYUAN, (1, 16, 33, 90, 160), (256, 4096), 768, steps=6),
    "hunyuan-480p": Case(HUNYUAN, (1, 16, 19, 60, 106), (256, 4096), 768, steps=7),
    "cogvideox-5b": Case(COGVIDEOX, (1, 16, 13, 60, 90), (226, 4096), steps=8),
}


def tiny(case: Case, *, heads: int = 3) -> Case:
    """The same with two blocks of each kind and few tokens."""
    small = {"depth": 2, "depth_single_blocks": 2, "num_layers": 2, "ffn_dim": 512, "hidden_size": 128 * heads, "dim": 128 * heads}
    small |= {"num_heads": heads, "num_attention_heads": heads}
    config = {name: small.get(name, value) for name, value in case.config.items()}
    text = (16, case.text[1])
    return replace(case, config=config, latent=(*case.latent[:2], *(4 for _ in case.latent[2:])), text=text, steps=5)
