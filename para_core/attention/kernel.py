"""What computes attention on one rank."""

from __future__ import annotations

from typing import Protocol

import torch


class NeedsLse(RuntimeError):
    """A ring was asked of a kernel that cannot give the log-sum-exp of its rows."""


class Kernel(Protocol):
    """Attention without dropout or causal mask.

    q ``(B, H, S, D)``; k, v ``(B, Hkv, M, D)`` with ``H % Hkv == 0``; any strides with a contiguous last dim.
    ``mask``: None or 2-D to 4-D, broadcastable to ``(B, H, S, M)`` once 4-D (see ``masks.as_4d``), bool (True = attend) or
    additive. ``scale``: None means ``D ** -0.5``.
    """

    @property
    def has_lse(self) -> bool:
        """Whether ``run_lse`` works."""

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None, scale: float | None) -> torch.Tensor:
        """``(B, H, S, D)`` in q's dtype, any memory layout."""

    def run_lse(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None, scale: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, and the natural log of each row's sum of exponentials: float32 ``(B, H, S)``, -inf for a row without keys."""


def expand_kv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Repeat the heads of k and v ``(B, Hkv, M, D)`` so that there are as many as q ``(B, H, S, D)`` has."""
    groups = q.shape[1] // k.shape[1]
    return (k, v) if groups == 1 else (k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
