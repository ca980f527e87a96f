"""Tiny models of every family, built from ComfyUI's own classes, and calls of them.

Sizes are odd on purpose: tokens, heads and frames that no number of ranks divides. Call nothing here before the `comfy`
fixture has run. A builder is called with what differs from the plain model, and returns (model, call).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

Tiny = tuple[torch.nn.Module, dict[str, Any]]
HEADS, WIDTH = 6, 96  # heads of 16


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def times(batch: int, scale: float = 1.0) -> torch.Tensor:
    return torch.linspace(0.7, 0.3, batch) * scale if batch > 1 else torch.tensor([0.7 * scale])


def mask(batch: int, length: int) -> torch.Tensor:
    """The first tokens of a text, fewer of the first image's."""
    return (torch.arange(length)[None] < torch.tensor([length - 3, length])[:batch, None]).long()


def settings() -> dict[str, Any]:
    import comfy.ops

    return {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}


def seeded(model: torch.nn.Module) -> torch.nn.Module:
    """Weights of a size that keeps activations of order one. Tables that the constructor computes stay as they are."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dtype.is_floating_point and tensor.numel() and name.split(".")[-1] not in ("pos_embedding", "filter", "kernel"):
                std = 0.15 if tensor.ndim < 2 else min(0.15, tensor.shape[-1] ** -0.5)
                mean = 1.0 if tensor.ndim == 1 and name.endswith(("weight", "scale")) else 0.0
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)
    return model.eval().requires_grad_(False)


def built(kind: type, **config: Any) -> torch.nn.Module:
    """A model that remembers how it was built, for what builds it again."""
    model = kind(**config, **settings())
    model.tiny_config = config
    return model


def residuals(kinds: dict[str, list[bool]], rows: int, width: int = WIDTH, batch: int = 2) -> dict[str, list]:
    """What ControlNets hand over: residuals for some blocks."""
    return {
        kind: [noise(batch, rows, width, seed=5 + index) if given else None for index, given in enumerate(blocks)]
        for kind, blocks in kinds.items()
    }


def fields(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if name in known}


BOTH = {"input": [True, False], "output": [True, True, True]}


def flux(*, second: bool = False, batch: int = 2, control: bool = False, **extra: Any) -> Tiny:
    from comfy.ldm.flux.model import Flux, FluxParams

    params = dict(
        in_channels=16,
        out_channels=16,
        vec_in_dim=None if second else 24,
        context_in_dim=40,
        hidden_size=WIDTH,
        mlp_ratio=2.0,
        num_heads=HEADS,
        depth=2,
        depth_single_blocks=3,
        axes_dim=[4, 4, 4, 4] if second else [4, 6, 6],
        theta=10000,
        patch_size=1 if second else 2,
        qkv_bias=not second,
        guidance_embed=True,
        txt_ids_dims=[3] if second else [],
    )
    if second:
        params.update(global_modulation=True, mlp_silu_act=True, ops_bias=False)
    model = built(Flux, image_model="flux", **fields(FluxParams, params))
    call = dict(
        x=noise(batch, 16, 9, 7) if second else noise(batch, 16, 10, 14),
        timestep=times(batch),
        context=noise(batch, 11, 40, seed=2),
        y=noise(batch, 24, seed=3),
        guidance=torch.full((batch,), 3.5),
        **extra,
    )
    if control:
        call["control"] = residuals(BOTH, 35)
    return seeded(model), call


def chroma(*, radiance: bool = False, control: bool = False) -> Tiny:
    params: dict[str, Any] = dict(
        image_model="chroma",
        context_in_dim=40,
        hidden_size=WIDTH,
        mlp_ratio=2.0,
        num_heads=HEADS,
        depth=2,
        depth_single_blocks=3,
        axes_dim=[4, 6, 6],
        theta=10000,
        qkv_bias=True,
        in_dim=64,
        out_dim=WIDTH,
        hidden_dim=64,
        n_layers=2,
    )
    call = dict(timestep=times(2), context=noise(2, 11, 40, seed=2), guidance=torch.zeros(2))
    if radiance:
        from comfy.ldm.chroma_radiance.model import ChromaRadiance

        nerf = dict(nerf_hidden_size=16, nerf_mlp_ratio=2, nerf_depth=1, nerf_max_freqs=4, nerf_tile_size=0)
        nerf |= dict(nerf_final_head_type="linear", nerf_embedder_dtype=torch.float32, use_x0=False)
        params |= dict(vec_in_dim=None, txt_ids_dims=[], use_sequential_txt_ids=False)
        model = built(ChromaRadiance, in_channels=3, out_channels=3, patch_size=4, **params, **nerf)
        return seeded(model), dict(x=noise(2, 3, 20, 28), **call)
    from comfy.ldm.chroma.model import Chroma

    model = built(Chroma, in_channels=64, out_channels=64, patch_size=2, txt_ids_dims=[], vec_in_dim=None, **params)
    if control:
        call["control"] = residuals(BOTH, 35)
    return seeded(model), dict(x=noise(2, 16, 10, 14), **call)


def hunyuan(*, batch: int = 2, newer: bool = False, control: bool = False, **extra: Any) -> Tiny:
    from comfy.ldm.hunyuan_video.model import HunyuanVideo, HunyuanVideoParams

    params = dict(
        in_channels=16,
        out_channels=16,
        vec_in_dim=None if newer else 24,
        context_in_dim=40,
        hidden_size=WIDTH,
        mlp_ratio=2.0,
        num_heads=HEADS,
        depth=2,
        depth_single_blocks=0 if newer else 3,
        axes_dim=[4, 6, 6],
        theta=256,
        patch_size=[1, 1, 1] if newer else [1, 2, 2],
        qkv_bias=True,
        guidance_embed=not newer,
        byt5=newer,
        meanflow=False,
        use_cond_type_embedding=newer,
        vision_in_dim=20 if newer else None,
        meanflow_sum=False,
    )
    model = built(HunyuanVideo, image_model="hunyuan_video", **fields(HunyuanVideoParams, params))
    call = dict(
        x=noise(batch, 16, 3, 5, 7) if newer else noise(batch, 16, 3, 6, 10),
        timestep=times(batch, 1000),
        context=noise(batch, 13, 40, seed=2),
        y=noise(batch, 24, seed=3),
        guidance=torch.full((batch,), 6.0),
        **extra,
    )
    if newer:
        call |= dict(txt_byt5=noise(batch, 5, 1472, seed=4), clip_fea=noise(batch, 7, 20, seed=5))
    if control:
        call["control"] = residuals({"input": [True] * 2, "output": [True] * 3}, 45)
    return seeded(model), call


def mochi(*, tokens: int = 11) -> Tiny:
    from comfy.ldm.genmo.joint_model.asymm_models_joint import AsymmDiTJoint

    model = built(
        AsymmDiTJoint,
        depth=3,
        patch_size=2,
        num_heads=HEADS,
        hidden_size_x=WIDTH,
        hidden_size_y=48,
        mlp_ratio_x=128.0,
        mlp_ratio_y=4.0,
        learn_sigma=False,
        in_channels=12,
        qk_norm=True,
        qkv_bias=False,
        out_bias=True,
        attn_drop=0.0,
        patch_embed_bias=True,
        posenc_preserve_area=True,
        timestep_mlp_bias=True,
        attend_to_padding=False,
        timestep_scale=1000.0,
        use_t5=True,
        t5_feat_dim=40,
        t5_token_length=16,
        rope_theta=10000.0,
    )
    held = (torch.arange(16)[None] < tokens).repeat(2, 1)
    call = dict(x=noise(2, 12, 3, 6, 10), timestep=times(2), context=noise(2, 16, 40, seed=2), attention_mask=held, num_tokens=tokens)
    return seeded(model), call


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
    return seeded(model), dict(x=noise(2, 16, 3, 6, 10), timestep=times(2, 1000), context=noise(2, 13, 40, seed=2))


WAN: dict[str, Any] = dict(in_dim=16, dim=72, ffn_dim=64, freq_dim=32, text_dim=40, out_dim=16, num_heads=HEADS, num_layers=4, text_len=32)


def wan_call(batch: int = 2, frames: int = 3, **extra: Any) -> dict[str, Any]:
    return dict(x=noise(batch, 16, frames, 6, 10), timestep=times(batch, 1000), context=noise(batch, 15, 40, seed=2)) | extra


def wan(model_type: str = "t2v", *, build: dict[str, Any] | None = None, **extra: Any) -> Tiny:
    from comfy.ldm.wan.model import WanModel

    return seeded(built(WanModel, model_type=model_type, **WAN, **(build or {}))), wan_call(**extra)


def wan_class(name: str, *, build: dict[str, Any] | None = None, module: str = "model", **extra: Any) -> Tiny:
    """A subclass of WanModel."""
    import importlib

    model = built(getattr(importlib.import_module(f"comfy.ldm.wan.{module}"), name), **WAN | (build or {}))
    if hasattr(model, "motion_encoder"):
        model.motion_encoder = Motion()
    return seeded(model), wan_call(**extra)


class Motion(torch.nn.Module):
    """Stands for the motion encoder, a large convolutional network that runs before the blocks."""

    def get_motion(self, faces: torch.Tensor) -> torch.Tensor:
        return faces.flatten(1)[:, :512]


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


def qwen(*, control: bool = False, **extra: Any) -> Tiny:
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    model = built(
        QwenImageTransformer2DModel,
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=HEADS,
        joint_attention_dim=40,
        axes_dims_rope=(4, 6, 6),
    )
    call = dict(x=noise(2, 16, 1, 10, 14), timestep=times(2), context=noise(2, 11, 40, seed=2), **extra)
    if control:
        call["control"] = residuals({"input": [True, False, True]}, 35)
    return seeded(model), call


def ltxv(*, build: dict[str, Any] | None = None, **extra: Any) -> Tiny:
    from comfy.ldm.lightricks.model import LTXVModel

    model = built(
        LTXVModel,
        in_channels=16,
        cross_attention_dim=WIDTH,
        attention_head_dim=16,
        num_attention_heads=HEADS,
        caption_channels=40,
        num_layers=3,
        timestep_scale_multiplier=1000.0,
        **(build or {}),
    )
    call = dict(x=noise(2, 16, 3, 3, 5), timestep=times(2)[:, None], context=noise(2, 11, 40, seed=2), attention_mask=None)
    return seeded(model), call | extra


def keyframes(strength: float | None = None) -> dict[str, Any]:
    """Two of the last frame's tokens are dropped; guides may be weaker than the rest."""
    kept = torch.ones(2, 16, 3, 3, 5)
    kept[:, :, 2, 0, :2] = -1
    call: dict[str, Any] = dict(denoise_mask=kept, keyframe_idxs=torch.zeros(2, 3, 15, 2), timestep=torch.rand(2, 45).sort().values)
    if strength is not None:
        call["guide_attention_entries"] = [{"pre_filter_count": 15, "strength": strength, "pixel_mask": None, "latent_shape": None}]
    return call


def ltxav(*, audio: int = 13, build: dict[str, Any] | None = None, **extra: Any) -> Tiny:
    from comfy.ldm.lightricks.av_model import LTXAVModel

    model = built(
        LTXAVModel,
        in_channels=16,
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
        **(build or {}),
    )
    for name in [name for name, _ in model.named_children() if name.endswith("connector")]:
        setattr(model, name, None)  # large, and only used on text before sampling
    latents = [noise(2, 16, 3, 3, 5), noise(2, 8, audio, 16, seed=7)]
    return seeded(model), dict(x=latents, timestep=times(2)[:, None], context=noise(2, 11, 80, seed=2), attention_mask=None) | extra


def each_frame() -> tuple[torch.Tensor, torch.Tensor]:
    """Timesteps of LTX-2: one a video frame, one an audio token."""
    return times(6).view(2, 3).repeat_interleave(15, 1), times(26).view(2, 13)


def sd3(*, twice: bool = False, control: bool = False) -> Tiny:
    """`twice`: the first blocks attend to the image a second time, as in 3.5 medium."""
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 40, "out_features": 192}}
    model = built(
        OpenAISignatureMMDITWrapper,
        input_size=None,
        patch_size=2,
        in_channels=16,
        depth=3,
        mlp_ratio=2.0,
        adm_in_channels=24,
        context_embedder_config=embedder,
        num_patches=1024,
        pos_embed_max_size=32,
        qk_norm="rms",
        x_block_self_attn_layers=[0, 1] if twice else [],
    )
    call = dict(x=noise(2, 16, 10, 14), timestep=times(2, 1000), context=noise(2, 11, 40, seed=2), y=noise(2, 24, seed=3))
    if control:
        call["control"] = residuals({"output": [True, True]}, 35, 192)
    return seeded(model), call


def lumina(*, z_image: bool = False, batch: int = 2, **extra: Any) -> Tiny:
    from comfy.ldm.lumina.model import NextDiT

    model = built(
        NextDiT,
        patch_size=2,
        in_channels=16,
        dim=288 if z_image else WIDTH,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=HEADS,
        n_kv_heads=HEADS if z_image else 2,
        multiple_of=32,
        ffn_dim_multiplier=2.0,
        norm_eps=1e-5,
        qk_norm=True,
        cap_feat_dim=40,
        axes_dims=(16, 16, 16) if z_image else (4, 6, 6),
        axes_lens=(300, 512, 512),
        z_image_modulation=z_image,
        pad_tokens_multiple=8 if z_image else None,
        time_scale=1000.0 if z_image else 1.0,
    )
    call = dict(x=noise(batch, 16, 10, 14), timestep=times(batch), context=noise(batch, 11, 40, seed=2), num_tokens=11)
    return seeded(model), call | extra


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


COSMOS: dict[str, Any] = dict(
    max_img_h=64,
    max_img_w=64,
    max_frames=16,
    in_channels=16,
    out_channels=16,
    patch_spatial=2,
    patch_temporal=1,
    concat_padding_mask=True,
    crossattn_emb_channels=40,
    model_channels=WIDTH,
    num_blocks=3,
    num_heads=HEADS,
    mlp_ratio=2.0,
    pos_emb_cls="rope3d",
    pos_emb_interpolation="crop",
    use_adaln_lora=True,
    adaln_lora_dim=32,
)


def cosmos_call(**extra: Any) -> dict[str, Any]:
    return dict(x=noise(2, 16, 3, 10, 14), timestep=times(2), context=noise(2, 11, 40, seed=2)) | extra


def predict2(*, extra_positions: bool = False, **extra: Any) -> Tiny:
    from comfy.ldm.cosmos.predict2 import MiniTrainDIT

    model = built(
        MiniTrainDIT, pos_emb_learnable=True, extra_per_block_abs_pos_emb=extra_positions, image_model="cosmos_predict2", **COSMOS
    )
    return seeded(model), cosmos_call(**extra)


def cosmos1() -> Tiny:
    from comfy.ldm.cosmos.model import GeneralDIT

    model = built(
        GeneralDIT,
        block_config="FA-CA-MLP",
        block_x_format="THWBD",
        pos_emb_learnable=False,
        affline_emb_norm=True,
        extra_per_block_abs_pos_emb=True,
        extra_per_block_abs_pos_emb_type="learnable",
        image_model="cosmos",
        **COSMOS,
    )
    return seeded(model), cosmos_call(attention_mask=None)
