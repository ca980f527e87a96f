"""Rule ``forecast`` on the model calls of a sampling run: which of them need no computing, and their results."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import comfy.model_sampling
import torch

from ..cache.first_block import Chunk, chunks
from ..cache.forecast import FLOW, FLOW_BY_RATIO, NOISE, Forecast, Scale, distance, velocity
from ..cache.rule import Decisions, decide
from .calls import ModelCall, tensors

NOISY = ("ancestral", "sde", "seeds", "sa_solver", "ddpm", "lcm")
"""In the names of ComfyUI's samplers that add noise. What the last results say of the next ones then holds for none of them."""


def scale(sampling: Any) -> Scale | None:
    """How a model with this ``model_sampling`` counts noise; None: nobody knows, as where it gives pictures and no direction."""
    known = {
        comfy.model_sampling.CONST: FLOW,
        comfy.model_sampling.COSMOS_RFLOW: FLOW_BY_RATIO,
        comfy.model_sampling.EPS: NOISE,
        comfy.model_sampling.V_PREDICTION: velocity(getattr(sampling, "sigma_data", 1.0)),
        comfy.model_sampling.EDM: velocity(getattr(sampling, "sigma_data", 1.0)),
        comfy.model_sampling.V_PREDICTION_DDPM: velocity(),
    }
    return next((own for kind, own in known.items() if type(sampling).calculate_denoised is kind.calculate_denoised), None)


def foreseen(sampling: Any, sampler: Any) -> Scale | str:
    """The scale of a model with this ``model_sampling``; or why steps of it, with this ``Sampler`` of ComfyUI's, cannot be foretold."""
    name = getattr(getattr(sampler, "sampler_function", None), "__name__", "").removeprefix("sample_")
    if any(word in name for word in NOISY):
        return f"the sampler {name} adds noise between steps, which the rule forecast cannot foresee"
    return scale(sampling) or "the rule forecast does not know what this model's results are"


class Forecaster:
    """Decides and answers for whole model calls, before any rank sees them. ``own``: the model's scale, ``largest``: its highest level."""

    def __init__(self, decisions: Decisions, own: Scale, largest: float):
        self.decisions, self.scale = decisions, own
        self.largest = 1.0 if own.ratio else largest
        self.forecast = Forecast()
        self._shapes: dict[Hashable, Hashable] = {}
        self._totals: list[float] = []
        self._schedule: tuple[Any, list[float]] = (None, [])

    def answer(self, model_calls: list[ModelCall]) -> list[Any] | None:
        """Foretold results of the calls of one step, None where they shall be computed (and then ``learn``ed).

        Waits once, for the noise level, which is there when the device is done with everything before it: what can be done
        without it comes first, and whatever else is read from the device is there as well then.
        """
        decisions = self.decisions
        self._shapes = {key: call.shape for call in model_calls for key in call.keys}
        self._totals = []
        sigma = [call.sigma for call in model_calls][0]  # of every call: in ``learn`` it would wait for the forward
        if not decisions.known(self._shapes):
            self.forecast.forget(self._shapes)
            return None
        level = self.scale.level(sigma)
        way = self.scale.weight(sigma) * distance(level, self._levels(model_calls[0]), self.largest)
        totals = [decisions.conditions[key].spent + self.forecast.cost(key, level, way) for key in self._shapes]
        if all(map(math.isfinite, totals)):
            self._totals = totals
        may_hit = self._totals and decisions.window.holds(sigma) and decisions.may_hit(self._shapes)
        if not (may_hit and decide(totals, decisions.settings.threshold)):
            return None
        for key, total in zip(self._shapes, totals, strict=True):
            decisions.conditions[key].spent = total
        decisions.record(self._shapes, sigma, totals, True)
        return [self._foretold(call) for call in model_calls]

    def learn(self, model_calls: list[ModelCall], results: list[Any]) -> None:
        """Keep what was computed for calls that ``answer`` had no results for."""
        for call, result in zip(model_calls, results, strict=True):
            level = self.scale.level(call.sigma)
            for chunk in parts(call):
                self.forecast.learn(chunk.key, level, [tensor[chunk.start : chunk.stop] for tensor in tensors(result)])
        self.decisions.record(self._shapes, model_calls[0].sigma, self._totals, False)

    def forget(self) -> None:
        """Foretell from nothing that was learnt so far."""
        self.decisions.forget()
        self.forecast = Forecast()

    def _levels(self, call: ModelCall) -> list[float]:
        """The run's noise levels, which samplers say anew with every call: read once, because the device waits meanwhile."""
        said = call.options.get("sample_sigmas")
        if said is not self._schedule[0]:
            self._schedule = (said, [self.scale.level(sigma) for sigma in call.schedule])
        return self._schedule[1]

    def _foretold(self, call: ModelCall) -> Any:
        found = [self.forecast.foretell(chunk.key, self.scale.level(call.sigma)) for chunk in parts(call)]
        joined = [torch.cat(rows).to(call.latents[0].dtype) for rows in zip(*found, strict=True)]
        return joined[0] if isinstance(call.call.args[0], torch.Tensor) else joined


def parts(call: ModelCall) -> tuple[Chunk, ...]:
    """The conditions of a call with their batch rows."""
    return chunks(call.keys, call.rows // call.chunks, 0, call.rows)
