"""Rule ``forecast`` on the model calls of a sampling run: which of them need no computing, and their results."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import torch

from ..cache.first_block import Chunk, chunks
from ..cache.forecast import Forecast, distance
from ..cache.rule import Decisions, decide
from .calls import ModelCall, tensors


class Forecaster:
    """Decides and answers for whole model calls, before any rank sees them. ``largest``: the model's highest noise level."""

    def __init__(self, decisions: Decisions, largest: float):
        self.decisions, self.largest = decisions, largest
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
        way = distance(sigma, self._levels(model_calls[0]), self.largest)
        totals = [decisions.conditions[key].spent + self.forecast.cost(key, sigma, way) for key in self._shapes]
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
            for chunk in parts(call):
                self.forecast.learn(chunk.key, call.sigma, [tensor[chunk.start : chunk.stop] for tensor in tensors(result)])
        self.decisions.record(self._shapes, model_calls[0].sigma, self._totals, False)

    def _levels(self, call: ModelCall) -> list[float]:
        """The run's noise levels, which samplers say anew with every call: read once, because the device waits meanwhile."""
        said = call.options.get("sample_sigmas")
        if said is not self._schedule[0]:
            self._schedule = (said, call.schedule)
        return self._schedule[1]

    def _foretold(self, call: ModelCall) -> Any:
        found = [self.forecast.foretell(chunk.key, call.sigma) for chunk in parts(call)]
        joined = [torch.cat(rows).to(call.latents[0].dtype) for rows in zip(*found, strict=True)]
        return joined[0] if isinstance(call.call.args[0], torch.Tensor) else joined


def parts(call: ModelCall) -> tuple[Chunk, ...]:
    """The conditions of a call with their batch rows."""
    return chunks(call.keys, call.rows // call.chunks, 0, call.rows)
