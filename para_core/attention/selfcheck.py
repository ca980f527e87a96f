"""Quantised attention compared with exact attention on a few rows, so that a broken kernel does not cost an image."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from .backends import Request
from .backends.pytorch import run_lse as exact_attention
from .merge import NO_KEYS

ROWS = 64
"""Query rows compared per call, evenly spaced."""
BOUND = 0.1
"""Largest relative L2 error. Working kernels: SageAttention 2.2 3.9e-2, int8 1.8e-2 (unit-normal data, H100)."""
LSE_BOUND = 0.1
"""Largest root mean square error of the log-sum-exp (natural log): what a merge weight may be off."""


@dataclass
class SelfCheck:
    """Checks of one run. A layer is known by the number of its call within the forward.

    Every layer is compared in the first forward of each kind of call. Later only NaN and infinity are looked for, on the same
    rows, collected on the device and read once per forward.
    """

    bound: float = BOUND
    compared: int = 0
    """Calls compared with exact attention."""
    worst: dict[str, float] = field(default_factory=dict)
    """Largest relative error seen, by backend."""
    _layer: int = 0
    _done: set[tuple[str, int, Request]] = field(default_factory=set)
    _sums: dict[tuple[str, torch.device], torch.Tensor] = field(default_factory=dict)

    def begin_forward(self) -> None:
        self._layer = 0

    def next_call(self) -> None:
        self._layer += 1

    def fault(
        self,
        request: Request,
        name: str,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        out: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> str | None:
        """Why ``out`` ``(B, H, S, D)`` of the backend ``name`` must not be used, or None.

        Waits for the device in the first forward of a kind of call only, and never while a CUDA graph is captured.
        """
        key = (name, self._layer, request)
        if key in self._done or _capturing(q):
            self._watch(name, out)
            return None
        self._done.add(key)
        self._total(name, out)  # made here, where nothing is captured: what a failed capture has made was never written
        self.compared += 1
        rows = _spread(q.shape[2], q.device)
        rows_mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
        exact, exact_lse = exact_attention(q[:, :, rows], k, v, mask=rows_mask, scale=scale)
        # Rows without keys may hold anything finite: nothing attends to them, but 0 * NaN is NaN.
        empty = exact_lse == NO_KEYS
        out, exact = out[:, :, rows].float(), exact.float()
        error = relative_error(*(tensor.masked_fill(empty.unsqueeze(-1), 0.0) for tensor in (out, exact)))
        numbers = [_finite(error, out, exact), torch.zeros_like(error)]
        if lse is not None:
            difference = (lse[:, :, rows] - exact_lse).masked_fill(empty, 0.0)
            numbers[1] = _finite(difference.square().mean().sqrt(), difference, exact)
        error, lse_error = torch.stack(numbers).tolist()
        if math.isinf(error):
            return "its output has NaN or infinity"
        self.worst[name] = max(error, self.worst.get(name, 0.0))
        if error > self.bound:
            return f"its output differs from exact attention by {error:.2g} (relative L2, bound {self.bound:g})"
        if lse_error > LSE_BOUND:
            return f"its log-sum-exp differs from the exact one by {lse_error:.2g} (bound {LSE_BOUND:g})"
        return None

    def _watch(self, name: str, out: torch.Tensor) -> None:
        """Add a few rows of ``out`` to a running sum on the device: NaN and infinity stay visible in it."""
        self._total(name, out).add_(out[:, :, :: max(1, out.shape[2] // ROWS)].sum(dtype=torch.float32))

    def _total(self, name: str, out: torch.Tensor) -> torch.Tensor:
        if (name, out.device) not in self._sums:
            self._sums[name, out.device] = torch.zeros((), device=out.device)
        return self._sums[name, out.device]

    @property
    def watching(self) -> bool:
        """Whether the output of some backend is looked through after every forward."""
        return bool(self._sums)

    def broken(self) -> list[str]:
        """The backends whose output held NaN or infinity since the last look. Waits for the device."""
        names = []
        for (name, _), total in self._sums.items():
            if not torch.isfinite(total).item():
                names.append(name)
                total.zero_()
        return names


def relative_error(out: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """``|out - exact| / |exact|`` (L2) of float32 tensors, as a scalar."""
    return torch.linalg.vector_norm(out - exact) / torch.linalg.vector_norm(exact).clamp_min(1e-12)


def _finite(error: torch.Tensor, got: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """``error``, but infinite where ``got`` is not finite, and 0 where ``exact`` is not: broken inputs are not the kernel's fault."""
    error = error.masked_fill(~torch.isfinite(got).all(), float("inf"))
    return error.masked_fill(~torch.isfinite(exact).all(), 0.0)


def _spread(count: int, device: torch.device) -> torch.Tensor:
    """Up to ``ROWS`` row numbers, evenly spaced, first and last included."""
    return torch.linspace(0, count - 1, min(ROWS, count), device=device).round().long()


def _capturing(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
