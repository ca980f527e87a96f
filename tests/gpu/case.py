"""What cases do in their process: a FLUX from a file, prompts for it, and a second rank, on another card where there is one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

FLUX = "flux.safetensors"


def write_flux(folder: Path, *, cpu: bool, heads: int = 1) -> dict[str, Any]:
    """A FLUX of 1.1 GB in float32 in ``folder``; for CPUs of 8 MB times ``heads`` squared. Returns its weights."""
    from env import models
    from safetensors.torch import save_file

    heads, double, single = (heads, 1, 1) if cpu else (8, 4, 8)
    model = models.flux(seed=51, heads=heads, double_blocks=double, single_blocks=single)
    save_file(model, folder / FLUX)
    return model


def second_rank(script: Path | None = None, *, cpu: bool) -> Any:
    """The group of this process, whose second rank is on the same card as the first if there is no other.

    ``script``: in place of the real sidecar.
    """
    import torch

    from para_core.comfy import sidecars
    from para_core.group.group import Group

    if script is not None:
        sidecars._group = Group(script, sidecars._hello)
    group = sidecars.group()
    if cpu or torch.cuda.device_count() < 2:
        sidecars.devices = lambda settings, *_: ["cpu" if cpu else "cuda:0"] * (settings.gpus - 1)
        group._pool._environment["NCCL_HOSTID"] = "paradit-rank1"  # see processes.outcome
    return group


def available(mode: str, *, cpu: bool) -> str:
    """A mode of Compile Blocks, without the graphs on a CPU, which has none and says so."""
    return {"graph": "off", "compile+graph": "compile"}.get(mode, mode) if cpu else mode


def sample(model: Any, steps: int, *, big: bool) -> Any:
    """A prompt of 1024 x 1040 pixels, or of a few: its latents, float32 on the CPU."""
    import comfy.sample
    import torch
    from env import models

    make = partial(torch.randn, generator=torch.Generator().manual_seed(5))
    text = [[make(1, 33, models.FLUX_TEXT_WIDTH), {"pooled_output": make(1, models.FLUX_POOLED_WIDTH)}]]
    latent = torch.zeros(1, models.LATENT_CHANNELS, *((128, 130) if big else (18, 22)))
    result = comfy.sample.sample(model, make(*latent.shape), steps, 1.0, "euler", "simple", text, text, latent, disable_pbar=True, seed=5)
    return result.float().cpu()


def relative(latent: Any, expected: Any) -> float:
    return float((latent - expected).norm() / expected.norm())
