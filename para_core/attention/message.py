"""What one rank sends another before attention: its rows of q, k and v for the other's heads, as one contiguous piece.

Blocks are the pieces of ``n`` neighbouring ranks that get, or give, equally much: ``(n, size)``. Tensors are
``(n, rows, B, heads, D)``: rows first, so that pieces of several ranks follow each other as their rows do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from . import wire


@dataclass(frozen=True)
class Piece:
    """How much one rank sends another."""

    batch: int
    q_rows: int
    kv_rows: int
    q_heads: int
    kv_heads: int
    dim: int

    @property
    def q(self) -> tuple[int, int, int, int]:
        return self.q_rows, self.batch, self.q_heads, self.dim

    @property
    def kv(self) -> tuple[int, int, int, int]:
        return self.kv_rows, self.batch, 2 * self.kv_heads, self.dim

    @property
    def numel(self) -> int:
        return math.prod(self.q) + math.prod(self.kv)


class Form(Protocol):
    """How a piece is laid out."""

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the buffers; None for that of q, k and v."""

    def __hash__(self) -> int:
        """A form is one of few objects."""

    def size(self, piece: Piece) -> int:
        """Elements of one piece."""

    def write(self, block: torch.Tensor, piece: Piece, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Fill ``block`` ``(n, size)``."""

    def read(self, block: torch.Tensor, piece: Piece, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Fill q, k and v with what was written."""


class Rows:
    """``[rows][B][q | k | v heads][D]``, for q and k of equal length: what arrives is used in place."""

    dtype = None

    def size(self, piece: Piece) -> int:
        return piece.numel

    def write(self, block: torch.Tensor, piece: Piece, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        heads = block.view(len(block), piece.q_rows, piece.batch, piece.q_heads + 2 * piece.kv_heads, piece.dim)
        for part, tensor in zip(heads.split((piece.q_heads, piece.kv_heads, piece.kv_heads), dim=3), (q, k, v), strict=True):
            part.copy_(tensor)

    def read(self, block: torch.Tensor, piece: Piece, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        raise NotImplementedError("what arrives is used in place")


class Parts:
    """``[rows][B][q heads][D]``, then ``[rows][B][k | v heads][D]``."""

    dtype = None

    def size(self, piece: Piece) -> int:
        return piece.numel

    def write(self, block: torch.Tensor, piece: Piece, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        for part, tensor in zip(self._views(block, piece), (q, k, v), strict=True):
            part.copy_(tensor)

    def read(self, block: torch.Tensor, piece: Piece, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        for part, tensor in zip(self._views(block, piece), (q, k, v), strict=True):
            tensor.copy_(part)

    def _views(self, block: torch.Tensor, piece: Piece) -> tuple[torch.Tensor, ...]:
        border = math.prod(piece.q)
        kv = block[:, border:].unflatten(1, piece.kv)
        return block[:, :border].unflatten(1, piece.q), *kv.chunk(2, dim=3)


class Bytes:
    """Quantised (see ``wire``): float32 peaks and means, then one byte an element. Sizes are multiples of 16 bytes."""

    dtype = torch.uint8

    def __init__(self, quantise: Callable[..., None] = wire.quantise, dequantise: Callable[..., None] = wire.dequantise):
        self._quantise, self._dequantise = quantise, dequantise

    def size(self, piece: Piece) -> int:
        return -(-(4 * sum(self._floats(piece)) + piece.numel) // 16) * 16

    def write(self, block: torch.Tensor, piece: Piece, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self._each(self._quantise, block, piece, q, k, v, fresh=True)

    def read(self, block: torch.Tensor, piece: Piece, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self._each(self._into, block, piece, q, k, v, fresh=False)

    def _each(self, act: Callable[..., None], block: torch.Tensor, piece: Piece, *tensors: torch.Tensor, fresh: bool) -> None:
        if not piece.numel:
            return
        floats = self._floats(piece)
        start = 4 * sum(floats)
        q_peaks, kv_peaks, means = block[:, :start].view(torch.float32).split(floats, dim=1)
        means = means.unflatten(1, (1, piece.batch, piece.kv_heads, piece.dim))
        codes = block[:, start : start + piece.numel].split((math.prod(piece.q), math.prod(piece.kv)), dim=1)
        k_codes, v_codes = codes[1].unflatten(1, piece.kv).chunk(2, dim=3)
        k_peaks, v_peaks = kv_peaks.unflatten(1, (*piece.kv[:3], 1)).chunk(2, dim=3)
        q, k, v = tensors
        if q.numel():
            act(q, codes[0].unflatten(1, piece.q), q_peaks.unflatten(1, (*piece.q[:3], 1)))
        if k.numel():
            if fresh:
                means.copy_(wire.rough_mean(k))
            act(k, k_codes, k_peaks, means.to(k.dtype))
            act(v, v_codes, v_peaks)

    def _into(self, tensor: torch.Tensor, codes: torch.Tensor, peaks: torch.Tensor, mean: torch.Tensor | None = None) -> None:
        self._dequantise(codes, peaks, tensor, mean)

    @staticmethod
    def _floats(piece: Piece) -> tuple[int, int, int]:
        return math.prod(piece.q[:3]), math.prod(piece.kv[:3]), piece.batch * piece.kv_heads * piece.dim


ROWS, PARTS, BYTES = Rows(), Parts(), Bytes()
