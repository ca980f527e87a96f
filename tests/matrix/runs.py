"""One run of the matrix: the shared forwards and what they must equal."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from families.cases import CASES
from families.ranks import OVERRIDE, error, latents, later, shared, stock
from families.tiny import Tiny

from para_core.plans import plan_for
from para_core.plans.plan import attribute
from para_core.sequence.degrees import choose
from para_core.sequence.mesh import Degrees

from .axes import CACHES, SPEEDS, SPLITS
from .masks import MASKS, Masked
from .neighbours import NEIGHBOURS, control
from .shapes import SHAPES, image_tokens, reshaped


@dataclass(frozen=True)
class Run:
    """A value of every axis."""

    case: str
    split: str
    ranks: str
    borders: str
    speeds: str
    cache: str
    shape: str
    mask: str
    neighbour: str

    def __str__(self) -> str:
        return ", ".join(vars(self).values())


@dataclass(frozen=True)
class Outcome:
    family: str
    degrees: Degrees
    error: float


@functools.lru_cache(maxsize=2)
def build(case: str) -> Tiny:
    return CASES[case]()


def compute(run: Run) -> Outcome:
    """The largest relative error of the run's forwards.

    They are compared with the stock forward, or, where the cache hits, with the same cached run on one rank.
    """
    from para_core.comfy import calls, lanes
    from para_core.comfy.split import separable, shortest

    model, call = build(run.case)
    plan, neighbour = plan_for(model), NEIGHBOURS[run.neighbour]
    assert plan is not None
    call = reshaped(plan, model, call, SHAPES[run.shape], int(run.ranks))
    rows = latents(call)[0].shape[0]
    if neighbour.control:
        call["control"] = control(run.case, image_tokens(plan, model, call), rows)
    rest = {name: value for name, value in call.items() if name not in ("x", "timestep")}
    model_call = calls.ModelCall(lanes.Call((call["x"], call["timestep"]), rest), calls.names(model))
    degrees, _ = choose(
        int(run.ranks),
        **SPLITS[run.split](int(run.ranks)),
        rows=separable(plan, model_call),
        heads=attribute(model, plan.heads),
        tokens=shortest(plan, model, model_call),
        log_sum_exp=neighbour.previous is None,
    )
    thresholds = CACHES[run.cache]
    steps = [call] if thresholds is None else [call, later(call)]
    form = MASKS[run.mask]
    masked = Masked(form, rows) if form is not None else None
    given = dict(
        thresholds=thresholds, options=neighbour.options, previous=neighbour.previous, around=masked.shared if masked is not None else None
    )
    override = masked.stock(neighbour.previous) if masked is not None else neighbour.previous
    options = {**neighbour.options, **({OVERRIDE: override} if override is not None else {})}
    with ExitStack() as stack:
        if masked is not None:
            stack.enter_context(masked.watching(plan, model))
        if run.cache == "hits":
            expected, hits = shared(model, steps, **given)
            assert hits == [False, True]
        else:
            expected, hits = [stock(model, step, options) for step in steps], [False] * len(steps)
        results, theirs = shared(
            model, steps, degrees.ring, degrees.ulysses, degrees.batch, speeds=SPEEDS[run.speeds], whole=run.borders == "whole", **given
        )
    assert theirs == hits
    return Outcome(plan.family, degrees, max(error(result, wanted) for result, wanted in zip(results, expected, strict=True)))


def sensitive(run: Run) -> float:
    """How much the run's mask and neighbour change the stock result: a run that changes nothing tests nothing."""
    model, call = build(run.case)
    plan, neighbour = plan_for(model), NEIGHBOURS[run.neighbour]
    assert plan is not None
    changed = dict(call)
    if neighbour.control:
        changed["control"] = control(run.case, image_tokens(plan, model, call), latents(call)[0].shape[0])
    form = MASKS[run.mask]
    options = dict(neighbour.options)
    with torch.inference_mode(), ExitStack() as stack:
        if form is not None:
            masked = Masked(form, latents(call)[0].shape[0])
            stack.enter_context(masked.watching(plan, model))
            options[OVERRIDE] = masked.stock(neighbour.previous)
        elif neighbour.previous is not None:
            options[OVERRIDE] = neighbour.previous
        return error(stock(model, changed, options), stock(model, call))
