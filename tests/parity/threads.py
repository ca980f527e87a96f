"""One model call shared by ranks that are threads: deep copies of a tiny model from ComfyUI's own classes, no processes.

Call nothing here before the `comfy` fixture has run.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from unit.fake_comm import fake_meshes, on_ranks

from para_core.attention.choice import Chooser
from para_core.execution.runner import Runner
from para_core.plans import plan_for
from para_core.sequence.hooks import Arguments

from .inprocess import noise

OVERRIDE = "optimized_attention_override"


def seeded(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights of a size that keeps activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dtype.is_floating_point and tensor.numel():
                std = 0.15 if tensor.ndim < 2 else min(0.15, tensor.shape[-1] ** -0.5)
                mean = 1.0 if tensor.ndim == 1 and name.endswith(("weight", "scale")) else 0.0
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)
    return model.eval().requires_grad_(False)


def flux(*, flux2: bool = False, heads: int = 6) -> torch.nn.Module:
    """FLUX with heads of 16 and 5 blocks; flux2: modulation shared by all blocks, no patches, no biases."""
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    second = {"global_modulation": True, "mlp_silu_act": True, "ops_bias": False} if flux2 else {}
    return seeded(
        Flux(
            image_model="flux",
            in_channels=16,
            out_channels=16,
            vec_in_dim=None if flux2 else 24,
            context_in_dim=40,
            hidden_size=16 * heads,
            mlp_ratio=2.0,
            num_heads=heads,
            depth=2,
            depth_single_blocks=3,
            axes_dim=[4, 4, 4, 4] if flux2 else [4, 6, 6],
            theta=10000,
            patch_size=1 if flux2 else 2,
            qkv_bias=not flux2,
            guidance_embed=True,
            txt_ids_dims=[3] if flux2 else [],
            dtype=torch.float32,
            device="cpu",
            operations=comfy.ops.disable_weight_init,
            **second,
        )
    )


def flux_call(batch: int = 2, size: tuple[int, int] = (10, 14), text: int = 11, **extra: Any) -> dict[str, Any]:
    return {
        "x": noise(batch, 16, *size, seed=1),
        "timestep": torch.linspace(0.7, 0.3, batch),
        "context": noise(batch, text, 40, seed=2),
        "y": noise(batch, 24, seed=3),
        "guidance": torch.full((batch,), 3.5),
        **extra,
    }


def wan(heads: int = 6, **changes: Any) -> torch.nn.Module:
    import comfy.ops
    from comfy.ldm.wan.model import WanModel

    settings = dict(in_dim=16, dim=12 * heads, ffn_dim=64, freq_dim=32, text_dim=40, out_dim=16, num_heads=heads, num_layers=4, text_len=32)
    operations = comfy.ops.disable_weight_init
    return seeded(WanModel(**settings, **changes, dtype=torch.float32, device="cpu", operations=operations))


def wan_call(batch: int = 2, size: tuple[int, int, int] = (3, 6, 10), text: int = 15, **extra: Any) -> dict[str, Any]:
    timestep = torch.linspace(700.0, 300.0, batch)
    return {"x": noise(batch, 16, *size, seed=1), "timestep": timestep, "context": noise(batch, text, 40, seed=2), **extra}


def stock(model: torch.nn.Module, call: dict[str, Any]) -> torch.Tensor:
    with torch.inference_mode():
        return model(**copy.deepcopy(call), transformer_options={})


def shared(model: torch.nn.Module, call: dict[str, Any], ring: int = 1, ulysses: int = 1) -> torch.Tensor:
    """The first rank's result; the others must have none."""
    from para_core.comfy import calls

    copies = [copy.deepcopy(model) for _ in range(ring * ulysses)]
    meshes = fake_meshes(ring, ulysses)

    def work(rank: int) -> torch.Tensor | None:
        plan = plan_for(copies[rank])
        assert plan is not None
        runner = Runner(plan, copies[rank], Chooser(None), cached=False)
        try:
            options = {OVERRIDE: runner.override}
            arguments = Arguments([], (), {**copy.deepcopy(call), "transformer_options": options})
            entry = getattr(copies[rank], calls.entry(copies[rank]))
            return runner.run(entry, calls.names(copies[rank]), (), arguments.kwargs, mesh=meshes[rank])
        finally:
            runner.remove()

    first, *others = on_ranks(ring * ulysses, work, [comm for mesh in meshes for comm in (mesh.sequence, mesh.ulysses, mesh.ring)])
    assert first is not None and all(other is None for other in others)
    return first
