"""FLUX.1 and FLUX.2, Chroma and Chroma Radiance."""

from __future__ import annotations

from typing import Any

import torch

from .common import HEADS, WIDTH, Tiny, built, fields, noise, residuals, seeded, times

BOTH = {"input": [True, False], "output": [True, True, True]}


def flux(*, second: bool = False, fill: bool = False, batch: int = 2, control: bool = False, **extra: Any) -> Tiny:
    """`second`: FLUX.2; `fill`: the picture to fill and its mask come as channels of their own."""
    from comfy.ldm.flux.model import Flux, FluxParams

    params = dict(
        in_channels=96 if fill else 16,
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
        x=noise(batch, 16, 9, 7) if second else noise(batch, 96 if fill else 16, 10, 14),
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
