"""Prompts in this process, as ComfyUI's sampler node would run them: short, on the tiny models, over real sidecars."""

from __future__ import annotations

import atexit
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
from parity import inprocess
from parity.inprocess import Job, load

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
    compiled: bool = False


@dataclass
class Outcome:
    latent: torch.Tensor
    report: dict[str, Any]
    log: list[str] = field(default_factory=list)

    def error(self, other: torch.Tensor) -> float:
        return inprocess.error(self.latent, other)


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


def sample(model, prompt: Prompt) -> torch.Tensor:
    return inprocess.sample(model, Job(prompt.kind, SIZES[prompt.kind], cfg=prompt.cfg, steps=STEPS, tokens=prompt.tokens))


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
    from para_core.settings import Cache, Compile, Parallel

    model = attach(load(prompt.kind), Parallel(gpus=prompt.ranks))
    model = attach(model, Compile("compile")) if prompt.compiled else model
    return attach(model, Cache(threshold=prompt.threshold)) if prompt.threshold else model


atexit.register(prepared.cache_clear)  # as in parity.inprocess


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

    def step(order, *ahead):
        nonlocal seen
        if seen == number:
            timers.append(threading.Timer(delay, act))
            timers[-1].daemon = True
            timers[-1].start()
        elif seen > number:
            happened.wait(10)
        seen += 1
        return original(order, *ahead)

    def undo() -> None:
        vars(group).pop("step", None)
        for timer in timers:
            timer.cancel()

    group.step = step
    return undo


def scripts() -> Path:
    return Path(__file__).parent
