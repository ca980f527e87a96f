"""What the rest of the stack would have added, guessed from the steps that were computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

NEAR = 1e-4
"""Relative difference below which two noise levels are one: some samplers come back to a level by logarithms, and through two
results that close, each of another latent, no line can be drawn. Steps of a schedule are ten times as far apart and more."""


def same(one: float, other: float) -> bool:
    """Whether two noise levels are one."""
    return abs(one - other) <= NEAR * max(abs(one), abs(other))


@dataclass
class History:
    """Residuals of the stack after the first block, of the last one or two computed forwards of a condition.

    Tensors (rows, S_local, C) in the model's dtype, with the noise level each belongs to.
    """

    order: int
    points: tuple[tuple[float, torch.Tensor], ...] = ()

    def add(self, sigma: float, residual: torch.Tensor) -> None:
        """Remember a computed residual; a second evaluation at one noise level replaces the first."""
        kept = tuple(point for point in self.points if not same(point[0], sigma))
        self.points = (*kept, (sigma, residual))[-(self.order + 1) :]

    def predict(self, sigma: float) -> torch.Tensor:
        """The residual at ``sigma``.

        Order 0 (``reuse``): the last computed residual r1. Order 1 (``taylor``): the first-order Taylor expansion about
        the last computed point, with the divided difference as derivative (TaylorSeer, arXiv 2503.06923):
        r(s) = r1 + (s - s1) * (r1 - r0) / (s1 - s0), evaluated in float32. With one point known it is r1.
        """
        last_sigma, last = self.points[-1]
        if len(self.points) < 2:
            return last
        before_sigma, before = self.points[0]
        weight = (sigma - last_sigma) / (last_sigma - before_sigma)
        return torch.lerp(last.float(), before.float(), -weight).to(last.dtype)


ORDERS = {"reuse": 0, "taylor": 1}
