"""What is tested of each family: one line a variant. A new family adds its lines here and its builder to tiny/."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .tiny import (
    Tiny,
    cogvideox,
    cosmos,
    flux,
    hidream,
    hunyuan,
    kandinsky,
    krea,
    ltx,
    lumina,
    mask,
    minimax,
    mochi,
    noise,
    omnigen,
    qwen,
    sd3,
    wan,
    whole,
)

REFERENCE = [noise(2, 16, 6, 10, seed=9)]
SQUARE = (noise(46, 46, seed=4) > 1.5).float() * -1e4
AUDIO_FRAMES = torch.tensor([[0.0, 700.0, 650.0], [0.0, 300.0, 250.0]])

CASES: dict[str, Callable[[], Tiny]] = {
    "flux": lambda: flux.flux(),
    "flux control": lambda: flux.flux(control=True),
    "flux kontext": lambda: flux.flux(ref_latents=REFERENCE),
    "flux kontext control": lambda: flux.flux(ref_latents=REFERENCE, control=True),
    "flux fill": lambda: flux.flux(fill=True),
    "flux mask": lambda: flux.flux(attention_mask=SQUARE),
    "flux2": lambda: flux.flux(second=True),
    "flux2 reference": lambda: flux.flux(second=True, ref_latents=[noise(2, 16, 5, 6, seed=9)], ref_latents_method="index"),
    "flux2 reference at timestep zero": lambda: flux.flux(
        second=True, batch=1, ref_latents=[noise(1, 16, 5, 6, seed=9)], ref_latents_method="index_timestep_zero"
    ),
    "chroma": lambda: flux.chroma(),
    "chroma control": lambda: flux.chroma(control=True),
    "chroma radiance": lambda: flux.chroma(radiance=True),
    "hunyuan video": lambda: hunyuan.hunyuan(),
    "hunyuan video mask": lambda: hunyuan.hunyuan(batch=1, attention_mask=mask(1, 13)),
    "hunyuan video guiding frame": lambda: hunyuan.hunyuan(guiding_frame_index=torch.zeros(2)),
    "hunyuan video reference": lambda: hunyuan.hunyuan(batch=1, ref_latent=noise(1, 16, 1, 6, 10, seed=8)),
    "hunyuan video control": lambda: hunyuan.hunyuan(control=True),
    "hunyuan image": lambda: hunyuan.hunyuan(image=True),
    "hunyuan video 1.5": lambda: hunyuan.hunyuan(newer=True),
    "mochi": lambda: mochi.mochi(),
    "mochi short text": lambda: mochi.mochi(tokens=2),
    "cogvideox": lambda: cogvideox.cogvideox(),
    "cogvideox 1.5": lambda: cogvideox.cogvideox(newer=True),
    "wan": lambda: wan.wan(),
    "wan image to video": lambda: wan.wan("i2v", clip_fea=noise(2, 9, 1280, seed=6)),
    "wan first and last frame": lambda: wan.wan("i2v", build=dict(flf_pos_embed_token_number=18), clip_fea=noise(2, 18, 1280, seed=6)),
    "wan timestep per frame": lambda: wan.wan(timestep=AUDIO_FRAMES),
    "wan reference": lambda: wan.wan(build=dict(in_dim_ref_conv=16), reference_latent=noise(2, 16, 6, 10, seed=7)),
    "wan reference with timestep per frame": lambda: wan.wan(
        build=dict(in_dim_ref_conv=16), reference_latent=noise(2, 16, 6, 10, seed=7), timestep=AUDIO_FRAMES
    ),
    "wan context latents": lambda: wan.wan(context_latents=[noise(2, 16, 1, 6, 8, seed=8)]),
    "wan camera": lambda: wan.wan_class(
        "CameraWanModel", camera_conditions=0.01 * noise(2, 24, 3, 48, 80, seed=5), clip_fea=noise(2, 9, 1280, seed=6)
    ),
    "wan scail": lambda: wan.wan_class(
        "SCAILWanModel", reference_latent=noise(2, 16, 1, 6, 10, seed=5), pose_latents=noise(2, 16, 3, 3, 5, seed=6)
    ),
    "wan scail 2": lambda: wan.wan_class(
        "SCAIL2WanModel",
        build=dict(mask_in_dim=4),
        reference_latent=noise(2, 16, 1, 6, 10, seed=5),
        ref_mask_latents=noise(2, 4, 4, 6, 10, seed=3),
        pose_latents=noise(2, 16, 3, 3, 5, seed=6),
        sam_latents=noise(2, 4, 3, 3, 5, seed=4),
    ),
    "wan vace": lambda: wan.wan_class(
        "VaceWanModel",
        build=dict(vace_layers=2, vace_in_dim=96),
        vace_context=noise(2, 2, 96, 3, 6, 10, seed=5),
        vace_strength=[1.0, 0.5],
    ),
    "wan humo": lambda: wan.wan_class(
        "HumoWanModel", size=(4, 6, 10), audio_embed=noise(2, 4, 8, 5, 1280, seed=3), reference_latent=noise(2, 16, 1, 6, 10, seed=4)
    ),
    "wan humo without audio": lambda: wan.wan_class("HumoWanModel"),
    "wan s2v": lambda: wan.wan_class(
        "WanModel_S2V",
        build=dict(audio_dim=32, audio_inject_layers=[0, 2, 3]),
        audio_embed=noise(2, 25, 32, 12, seed=3),
        reference_latent=noise(2, 16, 1, 6, 10, seed=4),
    ),
    "wan animate": lambda: wan.wan_class(
        "AnimateWanModel",
        module="model_animate",
        build=dict(num_layers=5),
        pose_latents=noise(2, 16, 2, 6, 10, seed=5),
        face_pixel_values=noise(2, 3, 8, 16, 16, seed=6),
    ),
    "wan dancer": lambda: wan.wan_class(
        "WanDancerModel",
        module="model_wandancer",
        build=dict(audio_inject_layers=[0, 2, 3]),
        x=noise(2, 16, 3, 8, 8),
        audio_embed=noise(2, 12, 35, seed=3),
    ),
    "minimax": lambda: minimax.minimax(),
    "minimax first frame": lambda: minimax.minimax(condition=True),
    "qwen image": lambda: qwen.qwen(),
    "qwen image edit": lambda: qwen.qwen(ref_latents=[noise(2, 16, 1, 6, 10, seed=9)], ref_latents_method="index"),
    "qwen image edit at timestep zero": lambda: qwen.qwen(
        ref_latents=[noise(2, 16, 1, 6, 10, seed=9)], ref_latents_method="index_timestep_zero"
    ),
    "qwen image mask": lambda: qwen.qwen(attention_mask=mask(2, 11)),
    "qwen image edit control": lambda: qwen.qwen(ref_latents=[noise(2, 16, 1, 6, 10, seed=9)], control=True),
    "ltx video": lambda: ltx.ltxv(),
    "ltx video timestep per token": lambda: ltx.ltxv(timestep=torch.rand(2, 45, generator=torch.Generator().manual_seed(3))),
    "ltx video mask": lambda: ltx.ltxv(attention_mask=mask(2, 11)),
    "ltx video keyframes": lambda: ltx.ltxv(**ltx.keyframes()),
    "ltx video weak guide": lambda: ltx.ltxv(**ltx.keyframes(strength=0.4)),
    "ltx video adaln": lambda: ltx.ltxv(build=dict(cross_attention_adaln=True)),
    "ltx 2": lambda: ltx.ltxav(),
    "ltx 2 timestep per frame": lambda: ltx.ltxav(timestep=ltx.each_frame()),
    "ltx 2 gated": lambda: ltx.ltxav(build=dict(apply_gated_attention=True, cross_attention_adaln=True)),
    "ltx 2 without audio": lambda: ltx.ltxav(audio=0),
    "ltx 2 little audio": lambda: ltx.ltxav(audio=2),
    "ltx 2 weak guide": lambda: ltx.ltxav(**ltx.keyframes(strength=0.4) | dict(timestep=ltx.each_frame())),
    "sd3": lambda: sd3.sd3(),
    "sd3 control": lambda: sd3.sd3(control=True),
    "sd3.5 medium": lambda: sd3.sd3(twice=True),
    "sd3.5 medium control": lambda: sd3.sd3(twice=True, control=True),
    "lumina 2": lambda: lumina.lumina(),
    "z-image": lambda: lumina.lumina(z_image=True),
    "z-image pixel space": lambda: lumina.lumina(z_image=True, pixels=True),
    "z-image omni": lambda: lumina.lumina(
        z_image=True, batch=1, ref_latents=[noise(1, 16, 6, 6, seed=4)], ref_contexts=[noise(1, 5, 40, seed=5)]
    ),
    "hidream": lambda: hidream.hidream(),
    "cosmos predict2": lambda: cosmos.predict2(),
    "cosmos predict2 timestep per frame": lambda: cosmos.predict2(timestep=torch.tensor([[0.7, 0.7, 0.1], [0.3, 0.3, 0.1]])),
    "cosmos predict2 positions per block": lambda: cosmos.predict2(extra_positions=True),
    "anima": lambda: cosmos.anima(),
    "cosmos 1": lambda: cosmos.cosmos1(),
    "kandinsky 5": lambda: kandinsky.kandinsky(),
    "kandinsky 5 image": lambda: kandinsky.kandinsky(x=noise(2, 16, 1, 10, 14)),
    "krea 2": lambda: krea.krea(),
    "krea 2 reference": lambda: krea.krea(ref_latents=[noise(2, 16, 1, 6, 10, seed=9)], ref_latents_method="index"),
    "krea 2 reference at timestep zero": lambda: krea.krea(
        ref_latents=[noise(2, 16, 1, 6, 10, seed=9)], ref_latents_method="index_timestep_zero"
    ),
    "omnigen2": lambda: omnigen.omnigen(),
    "omnigen2 reference": lambda: omnigen.omnigen(ref_latents=[noise(2, 16, 6, 10, seed=9)]),
}

# models whose blocks no plan describes
UNCUT: dict[str, Callable[[], Tiny]] = {
    "unet": lambda: whole.unet(),
    "aura": lambda: whole.aura(),
    "pixart": lambda: whole.pixart(),
    "ernie": lambda: whole.ernie(),
}
