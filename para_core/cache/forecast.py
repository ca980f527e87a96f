"""Steps foretold from the model's own results, without computing any block: rule ``forecast``.

Along a sampling run the result of a diffusion model changes smoothly with the noise level s. A step is foretold as
r1 + b (l - r1), where r1 is the last computed result of the same condition and l lies on the straight line through the
last two: the first-order form of TaylorSeer (arXiv 2503.06923), drawn through results instead of features. How far the
line can be trusted is measured: at every computed step, b is the share of it that would have come nearest to what came
out, between 0 (the last result stays) and 1 (the line).

How wrong that guess would have been is measured too. The error of a line through s0 and s1 grows like |(s - s0)(s - s1)|,
so the last one says what to expect of the next steps. A step of the sampler from s to s' moves the latent by about
(s - s') times the result, where s is the share of noise in the latent, and by some factor of it for models that do not give
the velocity along that share (``Scale``). The expected errors of foretold steps, each times that distance, are added up since the last
computed step, in percent; a step whose sum would reach the threshold is computed. That something is added up between
computed steps is the idea of TeaCache (arXiv 2411.19108) and EasyCache (arXiv 2507.02860); they add up how much changes,
this adds up how much of it the guess did not foresee.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from .predictor import ORDERS, History, same
from .reading import Reading

LINE = ORDERS["taylor"]
CAUTION = 0.8  # the best share at one computed step is often too much at the next; measured, see tests/bench/RESULTS.md


@dataclass(frozen=True)
class Scale:
    """How a kind of model counts noise. ``ratio``: its levels are sigma, noise over signal in a latent x = signal + sigma * noise.

    Rules are applied to u, the share of noise in x / (1 + sigma): 0 to 1 for every kind, and the level itself for flow matching.
    ``weight(sigma)``: how far a step moves that latent for a unit of the result, over how far it goes in u. From dx / dsigma =
    (x - denoised) / sigma, of which the result has the part c(sigma), it is c(sigma) * (1 + sigma).
    """

    ratio: bool
    weight: Callable[[float], float] = lambda _sigma: 1.0

    def level(self, sigma: float) -> float:
        return sigma / (1 + sigma) if self.ratio else sigma


FLOW = Scale(ratio=False)
FLOW_BY_RATIO = Scale(ratio=True)
NOISE = Scale(ratio=True, weight=lambda sigma: 1 + sigma)


def velocity(data: float = 1.0) -> Scale:
    """Of models that give v (arXiv 2202.00512), or what EDM's do (arXiv 2206.00364), of data with that deviation."""
    return Scale(ratio=True, weight=lambda sigma: (1 + sigma) * data / math.hypot(sigma, data))


class Measured:
    """What a computed step has shown: how far to go along the line, and the error by span.

    ``sums``: trust, wrong and whole, three float32 on the device that computed the step. They are waited for when a decision asks
    for them: behind the step itself that would leave the device idle until the sampler comes with the next one.
    """

    def __init__(self, sums: torch.Tensor, span: float):
        self._sums, self._span = Reading(sums), span

    @cached_property
    def _read(self) -> tuple[float, float]:
        trust, wrong, whole = self._sums.numbers
        return trust, wrong / whole / self._span if whole > 0 else math.inf

    @property
    def trust(self) -> float:
        return self._read[0]

    @property
    def bend(self) -> float:
        return self._read[1]


@dataclass
class Track:
    """What is known of one condition: a history for each of the model's results, and what the last computed step has shown."""

    histories: list[History]
    measured: Measured | None = None

    def span(self, sigma: float) -> float:
        """|(s - s0)(s - s1)| for the noise levels that the line is drawn through; 0 while there is no line, and at these levels."""
        levels = [level for level, _ in self.histories[0].points]
        if len(levels) < 2 or any(same(sigma, level) for level in levels):
            return 0.0
        return math.prod(abs(sigma - level) for level in levels)

    def expected(self, sigma: float) -> float:
        """The expected error of a foretold result, relative in the mean absolute; infinite where nothing is known of it.

        That is so at a level that was computed, too: a sampler that comes back to it does so with another latent.
        """
        span = self.span(sigma)
        return self.measured.bend * span if self.measured is not None and span else math.inf

    def foretell(self, sigma: float) -> list[torch.Tensor]:
        """The results at ``sigma``, float32, from at least one computed step."""
        trust = self.measured.trust if self.measured is not None else CAUTION
        return [torch.lerp(history.points[-1][1], history.predict(sigma), trust) for history in self.histories]

    def learn(self, sigma: float, results: Sequence[torch.Tensor]) -> None:
        """Keep computed ``results`` (float32), and measure what would have been foretold instead. Waits for no device."""
        span = self.span(sigma)
        if span:
            last = [history.points[-1][1] for history in self.histories]
            came = [result - old for result, old in zip(results, last, strict=True)]
            ahead = [history.predict(sigma) - old for history, old in zip(self.histories, last, strict=True)]
            pairs = list(zip(came, ahead, strict=True))
            right, size = (torch.stack(sums).sum() for sums in ([(a * b).sum() for a, b in pairs], [(b * b).sum() for _, b in pairs]))
            trust = (right / size).nan_to_num(1.0).clamp(0, 1) * CAUTION
            wrong = torch.stack([(a - trust * b).abs().sum() for a, b in pairs]).sum()
            whole = torch.stack([result.abs().sum() for result in results]).sum()
            self.measured = Measured(torch.stack((trust, wrong, whole)), span)
        for history, result in zip(self.histories, results, strict=True):
            history.add(sigma, result)


@dataclass
class Forecast:
    """Results of one sampling run by condition, on the process that samples. Tensors (rows, ...) of any shape, float32 inside."""

    tracks: dict[Hashable, Track] = field(default_factory=dict)

    def cost(self, key: Hashable, sigma: float, distance: float) -> float:
        """The expected error in percent that a foretold step leaves in the latent; infinite where nothing is known of it."""
        return 100 * distance * self.tracks[key].expected(sigma) if key in self.tracks else math.inf

    def foretell(self, key: Hashable, sigma: float) -> list[torch.Tensor]:
        return self.tracks[key].foretell(sigma)

    def learn(self, key: Hashable, sigma: float, results: Sequence[torch.Tensor]) -> None:
        """Keep copies: whoever asked for the results may write into them."""
        track = self.tracks.setdefault(key, Track([History(LINE) for _ in results]))
        track.learn(sigma, [result.to(torch.float32, copy=True) for result in results])

    def forget(self, keys: Iterable[Hashable]) -> None:
        for key in keys:
            self.tracks.pop(key, None)


def distance(sigma: float, schedule: Iterable[float], largest: float) -> float:
    """How far a sampler goes from ``sigma`` to the next lower level of its schedule, as a share of the ``largest`` level.

    All of one ``Scale``.
    """
    return (sigma - max((level for level in schedule if level < sigma), default=0.0)) / largest
