"""What cases do in their process: a FLUX from a file, prompts for it, and other ranks, on cards of their own where there are enough."""

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


def other_ranks(script: Path | None = None, *, cpu: bool) -> Any:
    """The group of this process. Its workers have the next cards, and share them with this process where there are too few.

    ``script``: in place of the real sidecar.
    """
    import torch

    from para_core.comfy import sidecars
    from para_core.group.group import Group

    if script is not None:
        sidecars._group = Group(script, sidecars._hello)
    group = sidecars.group()
    cards = 0 if cpu else torch.cuda.device_count()
    start = group._start

    def start_apart(rank: int, device: str) -> Any:
        group._pool._environment["NCCL_HOSTID"] = f"paradit-rank{rank}"  # see processes.outcome
        return start(rank, device)

    def devices(settings: Any, *_: Any) -> list[str]:
        group._start = start_apart if cards < settings.gpus else start
        return [f"cuda:{rank % cards}" if cards else "cpu" for rank in range(1, settings.gpus)]

    sidecars.devices = devices
    return group


def available(mode: str, *, cpu: bool) -> str:
    """A mode of Compile Blocks, without the graphs on a CPU, which has none and says so."""
    return {"graph": "off", "compile+graph": "compile"}.get(mode, mode) if cpu else mode


def sample(model: Any, steps: int, *, big: bool, cfg: float = 1.0) -> Any:
    """A prompt of 1024 x 1040 pixels, or of a few: its latents, float32 on the CPU. Its negative prompt counts from ``cfg`` 1 on."""
    import comfy.sample
    import torch
    from env import models

    make = partial(torch.randn, generator=torch.Generator().manual_seed(5))
    text, other = ([[make(1, 33, models.FLUX_TEXT_WIDTH), {"pooled_output": make(1, models.FLUX_POOLED_WIDTH)}]] for _ in range(2))
    latent = torch.zeros(1, models.LATENT_CHANNELS, *((128, 130) if big else (18, 22)))
    result = comfy.sample.sample(model, make(*latent.shape), steps, cfg, "euler", "simple", text, other, latent, disable_pbar=True, seed=5)
    return result.float().cpu()


def relative(latent: Any, expected: Any) -> float:
    return float((latent - expected).norm() / expected.norm())
