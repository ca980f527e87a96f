"""Numbers of q, k and v as bytes: 8 bits and one peak for each token of each head.

Kernels that quantise (SageAttention, arXiv 2410.02367) lose as much themselves, so that what they are given may travel in half
the bytes. A peak for each (token, head) needs no agreement between ranks. Keys have channels that are large in every token,
which would leave few bits to the rest, and which such kernels take off first as the mean; here it is a rank's own rough mean,
which travels along and is put back: an agreement is not needed for that either.

Error of an element: at most half a step, which is the vector's largest magnitude (of keys: after the mean) / 127, and the
rounding of the dtype. A vector with NaN or infinity arrives with NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from ..log import log

LEVELS = 127
MEAN_OF = 64
"""Rows that a rough mean is taken of."""
_SMALLEST = 1e-30  # a peak below it counts as zero: its reciprocal would be infinite


def rough_mean(k: torch.Tensor) -> torch.Tensor:
    """The mean of a few rows of ``k`` ``(n, M, B, H, D)``, evenly spaced: ``(n, 1, B, H, D)``, dtype of ``k``."""
    return k[:, :: max(1, k.shape[1] // MEAN_OF)].mean(1, keepdim=True)


def quantise(x: torch.Tensor, codes: torch.Tensor, peaks: torch.Tensor, mean: torch.Tensor | None = None) -> None:
    """Write ``x`` ``(..., D)``, less ``mean``, as ``codes`` (uint8, same shape) and ``peaks`` (float32 ``(..., 1)``).

    ``codes`` are round(x / peak * 127) + 128. As plain operations on tensors of n bytes in 16 bits, 6.5 n are moved, 2 n more
    with a mean; compiled to one kernel 1.5 n.
    """
    if mean is not None:
        x = x - mean
    torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True, dtype=torch.float32, out=peaks)
    # Conversion to integers drops what is behind the point: half a step more rounds. In 16 bits more values would be rounded up
    # than down, and attention, which averages over many tokens, does not average that out.
    middle = x.new_full((), 128.5, dtype=torch.float32)
    codes.copy_(torch.addcmul(middle, x, peaks.clamp_min(_SMALLEST).reciprocal(), value=LEVELS))


def dequantise(codes: torch.Tensor, peaks: torch.Tensor, into: torch.Tensor, mean: torch.Tensor | None = None) -> None:
    """The inverse: ``into`` ``(..., D)``, any strides. Plain operations on n bytes move 1.5 n, 2 n more with a mean."""
    torch.addcmul(peaks * (-128 / LEVELS), codes, peaks, value=1 / LEVELS, out=into)
    if mean is not None:
        into.add_(mean)


def round_trip(x: torch.Tensor, *, keys: bool = False) -> torch.Tensor:
    """``(B, H, S, D)`` as it would arrive; ``keys``: less its rough mean on the way."""
    rows = x.permute(2, 0, 1, 3)[None]
    codes, peaks = torch.empty_like(rows, dtype=torch.uint8), rows.new_empty(*rows.shape[:-1], 1, dtype=torch.float32)
    mean, result = rough_mean(rows) if keys else None, torch.empty_like(rows)
    quantise(rows, codes, peaks, mean)
    dequantise(codes, peaks, result, mean)
    return result[0].permute(1, 2, 0, 3)


class Compiled:
    """``function`` compiled to one kernel; as it is where that fails, which the log says.

    Compiled code is made anew for other strides, also those of dims of one: they are left out.
    """

    def __init__(self, function: Callable[..., None]):
        self._plain = function
        self._compiled: Callable[..., None] | None = torch.compile(function)

    def __call__(self, first: torch.Tensor, *rest: torch.Tensor | None) -> None:
        if self._compiled is not None:
            try:
                single = tuple(dim for dim, size in enumerate(first.shape[:-1]) if size == 1)
                return self._compiled(*(tensor.squeeze(single) for tensor in (first, *rest) if tensor is not None))
            except torch._dynamo.exc.TorchDynamoException as error:
                log.warning("%s runs in several kernels, because it could not be compiled: %s", self._plain.__name__, error)
                self._compiled = None
        return self._plain(first, *rest)


@lru_cache(maxsize=1)
def compiled() -> tuple[Compiled, Compiled]:
    """``quantise`` and ``dequantise`` as one kernel each: for runs whose blocks are compiled, and that have paid for it."""
    return Compiled(quantise), Compiled(dequantise)
