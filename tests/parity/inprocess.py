"""Sampling with ComfyUI's own functions in the test process, and what the pack's run line said about it.

Call nothing here before the `comfy` fixture has run.
"""

from __future__ import annotations

import atexit
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from env import models
from env.prepare import Environment

FILES = {
    "flux": f"diffusion_models/{models.FLUX_FILE}",
    "flux_small": f"checkpoints/{models.FLUX_CHECKPOINT_FILE}",  # one head: cheap, and no Ulysses
    "wan": f"diffusion_models/{models.WAN_FILE}",
}
LORAS = {"flux": models.FLUX_LORA_FILE, "wan": models.WAN_LORA_FILE}
_loaded: dict[str, Any] = {}
atexit.register(_loaded.clear)  # patchers do not end well once the modules they use have gone


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error in the Euclidean norm; infinite for another shape or a value that is not finite."""
    if result.shape != expected.shape or not result.isfinite().all():
        return float("inf")
    return float((result - expected).norm() / expected.norm())


@dataclass(frozen=True)
class Job:
    """What to sample. `size`: latent height and width, or frames, height and width for video."""

    kind: str = "flux"
    size: tuple[int, ...] = (9, 14)
    batch: int = 1
    cfg: float = 1.0
    steps: int = 2
    tokens: tuple[int, int] = (11, 11)
    sampler: str = "euler"
    seed: int = 42
    denoise: float = 1.0

    def but(self, **changes: Any) -> Job:
        return replace(self, **changes)

    def conditioning(self, seed: int, tokens: int, **extra: Any) -> list:
        if self.kind.startswith("flux"):
            pooled = noise(1, models.FLUX_POOLED_WIDTH, seed=seed + 50)
            return [[noise(1, tokens, models.FLUX_TEXT_WIDTH, seed=seed), {"pooled_output": pooled, **extra}]]
        return [[noise(1, tokens, models.WAN_TEXT_WIDTH, seed=seed), dict(extra)]]


def load(kind: str) -> Any:
    """The stock ModelPatcher of a tiny model: loaded once, never changed (nodes and `attach` work on clones)."""
    import comfy.sd

    if kind not in _loaded:
        file = str(Environment.locate().models / FILES[kind])
        if file.endswith(models.FLUX_CHECKPOINT_FILE):
            _loaded[kind] = comfy.sd.load_checkpoint_guess_config(file, output_vae=False, output_clip=False)[0]
        else:
            _loaded[kind] = comfy.sd.load_diffusion_model(file)
    return _loaded[kind]


def with_lora(kind: str, strength: float) -> Any:
    """What stock LoraLoaderModelOnly returns."""
    import comfy.sd
    import comfy.utils

    lora = comfy.utils.load_torch_file(str(Environment.locate().models / "loras" / LORAS[kind]), safe_load=True)
    return comfy.sd.load_lora_for_models(load(kind), None, lora, strength, 0)[0]


def sample(model: Any, job: Job, *, extra: dict[str, Any] | None = None, callback: Callable | None = None) -> torch.Tensor:
    """The latent that KSampler would make. `extra`: options of both conditionings (control, reference_latents, ...)."""
    import comfy.sample

    latent = torch.zeros(job.batch, models.LATENT_CHANNELS, *job.size)
    positive, negative = (job.conditioning(seed, tokens, **(extra or {})) for seed, tokens in zip((11, 12), job.tokens, strict=True))
    with torch.inference_mode():
        return comfy.sample.sample(
            model,
            noise(*latent.shape, seed=job.seed),
            job.steps,
            job.cfg,
            job.sampler,
            "simple",
            positive,
            negative,
            latent,
            denoise=job.denoise,
            callback=callback,
            disable_pbar=True,
            seed=job.seed,
        )


class _Capture(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.reports: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        _, found, line = record.getMessage().partition("[ParaDiT] run: ")
        if found:
            self.reports.append(json.loads(line))


@contextmanager
def reports() -> Iterator[list[dict[str, Any]]]:
    """The run lines logged inside the block."""
    logger, handler = logging.getLogger("paradit"), _Capture()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield handler.reports
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def run(model: Any, job: Job, *settings: Any, **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """The latent and the run line of `model` with our nodes' settings attached."""
    with reports() as lines:
        latent = sample(attached(model, *settings), job, **options)
    assert len(lines) == 1, f"one sampling run writes one line, got {len(lines)}"
    return latent, lines[0]


def attached(model: Any, *settings: Any) -> Any:
    from para_core.comfy.attach import attach

    for one in settings:
        model = attach(model, one)
    return model


def footprint(module: torch.nn.Module) -> list[tuple[Any, ...]]:
    """Everything a run could leave on a model: attributes of instances, and hooks, of every submodule."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
    return [(name, sorted(vars(part)), *(list(getattr(part, kind)) for kind in hooks)) for name, part in module.named_modules()]


def changed(before: Sequence[tuple], after: Sequence[tuple]) -> set[str]:
    """Names of the submodules whose footprints differ."""
    return {one[0] for one, other in zip(before, after, strict=True) if one != other}
