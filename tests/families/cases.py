"""What is tested of each family: one line a variant. A new family adds its lines here and its builder to tiny.py."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import tiny
from .tiny import Tiny, mask, noise

REFERENCE = [noise(2, 16, 6, 10, seed=9)]
SQUARE = (noise(46, 46, seed=4) > 1.5).float() * -1e4
AUDIO_FRAMES = torch.tensor([[0.0, 700.0, 650.0], [0.0, 300.0, 250.0]])

CASES: dict[str, Callable[[], Tiny]] = {
    "flux": lambda: tiny.flux(),
    "flux control": lambda: tiny.flux(control=True),
    "flux kontext": lambda: tiny.flux(ref_latents=REFERENCE),
    "flux kontext control": lambda: tiny.flux(ref_latents=REFERENCE, control=True),
    "flux mask": lambda: tiny.flux(attention_mask=SQUARE),
    "flux2": lambda: tiny.flux(second=True),
    "flux2 reference": lambda: tiny.flux(second=True, ref_latents=[noise(2, 16, 5, 6, seed=9)], ref_latents_method="index"),
    "flux2 reference at timestep zero": lambda: tiny.flux(
        second=True, batch=1, ref_latents=[noise(1, 16, 5, 6, seed=9)], ref_latents_method="index_timestep_zero"
    ),
    "chroma": lambda: tiny.chroma(),
    "chroma control": lambda: tiny.chroma(control=True),
    "chroma radiance": lambda: tiny.chroma(radiance=True),
    "hunyuan video": lambda: tiny.hunyuan(),
    "hunyuan video mask": lambda: tiny.hunyuan(batch=1, attention_mask=mask(1, 13)),
    "hunyuan video guiding frame": lambda: tiny.hunyuan(guiding_frame_index=torch.zeros(2)),
    "hunyuan video reference": lambda: tiny.hunyuan(batch=1, ref_latent=noise(1, 16, 1, 6, 10, seed=8)),
    "hunyuan video control": lambda: tiny.hunyuan(control=True),
    "hunyuan video 1.5": lambda: tiny.hunyuan(newer=True),
    "mochi": lambda: tiny.mochi(),
    "mochi short text": lambda: tiny.mochi(tokens=2),
    "cogvideox": lambda: tiny.cogvideox(),
    "cogvideox 1.5": lambda: tiny.cogvideox(newer=True),
    "wan": lambda: tiny.wan(),
    "wan image to video": lambda: tiny.wan("i2v", clip_fea=noise(2, 9, 1280, seed=6)),
    "wan first and last frame": lambda: tiny.wan("i2v", build=dict(flf_pos_embed_token_number=18), clip_fea=noise(2, 18, 1280, seed=6)),
    "wan timestep per frame": lambda: tiny.wan(timestep=AUDIO_FRAMES),
    "wan reference": lambda: tiny.wan(build=dict(in_dim_ref_conv=16), reference_latent=noise(2, 16, 6, 10, seed=7)),
    "wan reference, timestep per frame": lambda: tiny.wan(
        build=dict(in_dim_ref_conv=16), reference_latent=noise(2, 16, 6, 10, seed=7), timestep=AUDIO_FRAMES
    ),
    "wan context latents": lambda: tiny.wan(context_latents=[noise(2, 16, 1, 6, 8, seed=8)]),
    "wan camera": lambda: tiny.wan_class(
        "CameraWanModel", camera_conditions=0.01 * noise(2, 24, 3, 48, 80, seed=5), clip_fea=noise(2, 9, 1280, seed=6)
    ),
    "wan scail": lambda: tiny.wan_class(
        "SCAILWanModel", reference_latent=noise(2, 16, 1, 6, 10, seed=5), pose_latents=noise(2, 16, 3, 3, 5, seed=6)
    ),
    "wan vace": lambda: tiny.wan_class(
        "VaceWanModel",
        build=dict(vace_layers=2, vace_in_dim=96),
        vace_context=noise(2, 2, 96, 3, 6, 10, seed=5),
        vace_strength=[1.0, 0.5],
    ),
    "wan humo": lambda: tiny.wan_class(
        "HumoWanModel", frames=4, audio_embed=noise(2, 4, 8, 5, 1280, seed=3), reference_latent=noise(2, 16, 1, 6, 10, seed=4)
    ),
    "wan humo without audio": lambda: tiny.wan_class("HumoWanModel"),
    "wan s2v": lambda: tiny.wan_class(
        "WanModel_S2V",
        build=dict(audio_dim=32, audio_inject_layers=[0, 2, 3]),
        audio_embed=noise(2, 25, 32, 12, seed=3),
        reference_latent=noise(2, 16, 1, 6, 10, seed=4),
    ),
    "wan animate": lambda: tiny.wan_class(
        "AnimateWanModel",
        module="model_animate",
        build=dict(num_layers=5),
        pose_latents=noise(2, 16, 2, 6, 10, seed=5),
        face_pixel_values=noise(2, 3, 8, 16, 16, seed=6),
    ),
    "wan dancer": lambda: tiny.wan_class(
        "WanDancerModel",
        module="model_wandancer",
        build=dict(audio_inject_layers=[0, 2, 3]),
        x=noise(2, 16, 3, 8, 8),
        audio_embed=noise(2, 12, 35, seed=3),
    ),
    "minimax": lambda: tiny.minimax(),
    "minimax first frame": lambda: tiny.minimax(condition=True),
    "qwen image": lambda: tiny.qwen(),
    "qwen image edit": lambda: tiny.qwen(ref_latents=[noise(2, 16, 1, 6, 10, seed=9)], ref_latents_method="index"),
    "qwen image edit at timestep zero": lambda: tiny.qwen(
        ref_latents=[noise(2, 16, 1, 6, 10, seed=9)], ref_latents_method="index_timestep_zero"
    ),
    "qwen image mask": lambda: tiny.qwen(attention_mask=mask(2, 11)),
    "qwen image edit control": lambda: tiny.qwen(ref_latents=[noise(2, 16, 1, 6, 10, seed=9)], control=True),
    "ltx video": lambda: tiny.ltxv(),
    "ltx video timestep per token": lambda: tiny.ltxv(timestep=torch.rand(2, 45, generator=torch.Generator().manual_seed(3))),
    "ltx video mask": lambda: tiny.ltxv(attention_mask=mask(2, 11)),
    "ltx video keyframes": lambda: tiny.ltxv(**tiny.keyframes()),
    "ltx video weak guide": lambda: tiny.ltxv(**tiny.keyframes(strength=0.4)),
    "ltx video adaln": lambda: tiny.ltxv(build=dict(cross_attention_adaln=True)),
    "ltx 2": lambda: tiny.ltxav(),
    "ltx 2 timestep per frame": lambda: tiny.ltxav(timestep=tiny.each_frame()),
    "ltx 2 gated": lambda: tiny.ltxav(build=dict(apply_gated_attention=True, cross_attention_adaln=True)),
    "ltx 2 without audio": lambda: tiny.ltxav(audio=0),
    "ltx 2 weak guide": lambda: tiny.ltxav(**tiny.keyframes(strength=0.4) | dict(timestep=tiny.each_frame())),
    "sd3": lambda: tiny.sd3(),
    "sd3 control": lambda: tiny.sd3(control=True),
    "sd3.5 medium": lambda: tiny.sd3(twice=True),
    "sd3.5 medium control": lambda: tiny.sd3(twice=True, control=True),
    "lumina 2": lambda: tiny.lumina(),
    "z-image": lambda: tiny.lumina(z_image=True),
    "z-image omni": lambda: tiny.lumina(
        z_image=True, batch=1, ref_latents=[noise(1, 16, 6, 6, seed=4)], ref_contexts=[noise(1, 5, 40, seed=5)]
    ),
    "hidream": lambda: tiny.hidream(),
    "cosmos predict2": lambda: tiny.predict2(),
    "cosmos predict2 timestep per frame": lambda: tiny.predict2(timestep=torch.tensor([[0.7, 0.7, 0.1], [0.3, 0.3, 0.1]])),
    "cosmos predict2 positions per block": lambda: tiny.predict2(extra_positions=True),
    "cosmos 1": lambda: tiny.cosmos1(),
}
