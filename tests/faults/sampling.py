"""Prompts in this process, as ComfyUI's sampler node would run them: short, on the tiny models, over real sidecars."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from env import models
from env.prepare import Environment

STEPS = 4
TOLERANCE = STEPS * 1e-5  # relative, of a run without cached steps
REPORT = re.compile(r"\[ParaDiT\] run: (\{.*\})")
SIZES = {"flux": (10, 14), "wan": (3, 8, 10)}  # latent pixels; the token counts divide by nothing


@dataclass(frozen=True)
class Prompt:
    """``tokens``: lengths of the two prompts; if they differ, cfg > 1 takes two model calls a step."""

    kind: str = "flux"
    ranks: int = 2
    threshold: float = 0.0  # of the cache; 0: off
    cfg: float = 1.0
    tokens: tuple[int, int] = (11, 11)


@dataclass
class Outcome:
    latent: torch.Tensor
    report: dict[str, Any]
    log: list[str] = field(default_factory=list)

    def error(self, other: torch.Tensor) -> float:
        return ((self.latent - other).norm() / other.norm()).item()


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def log_lines() -> Iterator[list[str]]:
    logger, handler = logging.getLogger("paradit"), _Log()
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@cache
def load(kind: str):
    import comfy.sd

    name = {"flux": models.FLUX_FILE, "wan": models.WAN_FILE}[kind]
    return comfy.sd.load_diffusion_model(str(Environment.locate().models / "diffusion_models" / name))


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conditioning(kind: str, seed: int, tokens: int) -> list:
    if kind == "wan":
        return [[random(1, tokens, models.WAN_TEXT_WIDTH, seed=seed), {}]]
    pooled = random(1, models.FLUX_POOLED_WIDTH, seed=seed + 5)
    return [[random(1, tokens, models.FLUX_TEXT_WIDTH, seed=seed), {"pooled_output": pooled}]]


def sample(model, prompt: Prompt) -> torch.Tensor:
    import comfy.sample

    latent = torch.zeros(1, models.LATENT_CHANNELS, *SIZES[prompt.kind])
    positive, negative = (conditioning(prompt.kind, seed, tokens) for seed, tokens in zip((1, 2), prompt.tokens, strict=True))
    with torch.inference_mode():
        noise = random(*latent.shape, seed=42)
        return comfy.sample.sample(
            model, noise, STEPS, prompt.cfg, "euler", "simple", positive, negative, latent, disable_pbar=True, seed=42
        )


@cache
def stock(kind: str, cfg: float = 1.0, tokens: tuple[int, int] = (11, 11)) -> torch.Tensor:
    """What ComfyUI makes of the prompt on its own."""
    return sample(load(kind), Prompt(kind, cfg=cfg, tokens=tokens))


def reference(prompt: Prompt) -> torch.Tensor:
    return stock(prompt.kind, prompt.cfg, prompt.tokens)


@cache
def prepared(prompt: Prompt):
    """The model with the prompt's nodes applied, kept as a server keeps the results of nodes."""
    from para_core.comfy.attach import attach
    from para_core.settings import Cache, Parallel

    model = attach(load(prompt.kind), Parallel(gpus=prompt.ranks))
    return attach(model, Cache(threshold=prompt.threshold)) if prompt.threshold else model


def run(prompt: Prompt) -> Outcome:
    with log_lines() as lines:
        latent = sample(prepared(prompt), prompt)
    reports = [json.loads(found.group(1)) for line in lines if (found := REPORT.search(line))]
    return Outcome(latent, reports[-1], lines)


def check_full(prompt: Prompt) -> Outcome:
    """The prompt runs on all its ranks and gives the right image."""
    outcome = run(prompt)
    assert outcome.report["ranks"] == prompt.ranks, outcome.report
    assert outcome.report["notes"] == []
    if not outcome.report["cached"]:
        assert outcome.error(reference(prompt)) < TOLERANCE
    return outcome


def at_step(group, number: int, delay: float, action: Callable[[], None]) -> Callable[[], None]:
    """Have ``action`` happen ``delay`` seconds into the group's next step ``number`` (from 0). Returns how to undo it.

    The step after it begins only once it has happened, so that it falls within the run however busy the machine is.
    """
    original, seen, timers, happened = group.step, 0, [], threading.Event()

    def act() -> None:
        action()
        happened.set()

    def step(order):
        nonlocal seen
        if seen == number:
            timers.append(threading.Timer(delay, act))
            timers[-1].daemon = True
            timers[-1].start()
        elif seen > number:
            happened.wait(10)
        seen += 1
        return original(order)

    def undo() -> None:
        vars(group).pop("step", None)
        for timer in timers:
            timer.cancel()

    group.step = step
    return undo


def scripts() -> Path:
    return Path(__file__).parent
