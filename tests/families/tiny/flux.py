"""FLUX.1 and FLUX.2, Chroma and Chroma Radiance."""

from __future__ import annotations

from typing import Any

import torch

from .common import HEADS, WIDTH, Tiny, built, fields, given, noise, residuals, seeded

BOTH = {"input": [True, False], "output": [True, True, True]}


def flux(
    *,
    second: bool = False,
    fill: bool = False,
    batch: int = 2,
    size: tuple[int, int] | None = None,
    heads: int = HEADS,
    control: bool = False,
    **extra: Any,
) -> Tiny:
    """`second`: FLUX.2; `fill`: the picture to fill and its mask come as channels of their own."""
    from comfy.ldm.flux.model import Flux, FluxParams

    params: dict[str, Any] = dict(
        in_channels=96 if fill else 16,
        out_channels=16,
        vec_in_dim=None if second else 24,
        context_in_dim=40,
        hidden_size=16 * heads,
        mlp_ratio=2.0,
        num_heads=heads,
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
    sides = size or ((9, 7) if second else (10, 14))
    vectors = dict(y=noise(batch, 24, seed=3), guidance=torch.full((batch,), 3.5))
    call = given(batch, params["in_channels"], *sides, **vectors | extra)
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
    extra = dict(guidance=torch.zeros(2), **(dict(control=residuals(BOTH, 35)) if control else {}))
    if radiance:
        from comfy.ldm.chroma_radiance.model import ChromaRadiance

        nerf = dict(nerf_hidden_size=16, nerf_mlp_ratio=2, nerf_depth=1, nerf_max_freqs=4, nerf_tile_size=0)
        nerf |= dict(nerf_final_head_type="linear", nerf_embedder_dtype=torch.float32, use_x0=False)
        params |= dict(vec_in_dim=None, txt_ids_dims=[], use_sequential_txt_ids=False)
        model = built(ChromaRadiance, in_channels=3, out_channels=3, patch_size=4, **params, **nerf)
        return seeded(model), given(2, 3, 20, 28, **extra)
    from comfy.ldm.chroma.model import Chroma

    model = built(Chroma, in_channels=64, out_channels=64, patch_size=2, txt_ids_dims=[], vec_in_dim=None, **params)
    return seeded(model), given(2, 16, 10, 14, **extra)
