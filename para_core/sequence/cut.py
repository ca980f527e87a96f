"""The tokens of one forward: how long every segment is, who holds which rows, and the cuts themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .layout import Joint, balanced, weighted
from .mesh import Comm


class TokenError(RuntimeError):
    """A tensor does not have the rows that the plan and the first block say."""


class Cut:
    """State of one forward on one rank. Lengths are read off the first block's arguments by ``measure``.

    lengths: whole rows of each segment. rows: rows of each segment on each rank.
    """

    def __init__(self, rank: int, ranks: int, weights: Sequence[float] | None = None):
        self.rank, self.ranks, self.weights = rank, ranks, weights
        self.lengths: dict[str, int] = {}
        self.rows: dict[str, tuple[int, ...]] = {}
        self._joints: dict[tuple[str, ...], Joint] = {}
        self._remembered: dict[Any, tuple[Any, Any]] = {}

    def measure(self, segment: str, length: int) -> None:
        self.lengths[segment] = length
        self.rows[segment] = weighted(length, self.weights) if self.weights else balanced(length, self.ranks)

    def start(self, segment: str) -> int:
        """First row of ``segment`` that this rank holds."""
        return sum(self.rows[segment][: self.rank])

    def joint(self, segments: tuple[str, ...]) -> Joint:
        if segments not in self._joints:
            self._joints[segments] = Joint(tuple(self.rows[name] for name in segments))
        return self._joints[segments]

    def local(self, tensor: torch.Tensor, segments: tuple[str, ...], dim: int) -> torch.Tensor:
        """This rank's rows of ``tensor``, whose ``dim`` holds ``segments`` whole and in order. A view where it can be."""
        total = sum(self.lengths[name] for name in segments)
        if tensor.shape[dim] != total:
            raise TokenError(f"expected {total} rows of {'+'.join(segments)} in dim {dim} of {tuple(tensor.shape)}")
        if self.ranks == 1:
            return tensor
        pieces, base = [], 0
        for name in segments:
            pieces.append(tensor.narrow(dim, base + self.start(name), self.rows[name][self.rank]))
            base += self.lengths[name]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    def table(self, value, segments: tuple[str, ...], dim: int):
        """Cut what stock code passes whole to every block; the cut is made once a forward. Sizes of 1 broadcast."""
        if isinstance(value, (tuple, list)):
            return type(value)(self.table(item, segments, dim) for item in value)
        if not isinstance(value, torch.Tensor) or self.ranks == 1 or value.shape[dim] == 1:
            return value
        return self.remember((id(value), segments, dim), value, lambda: self.local(value, segments, dim))

    def remember(self, key, source, make: Callable[[], Any]):
        """``make()`` once a forward for each key; ``source`` is kept alive so that its id stays its own."""
        if self.ranks == 1:
            return source
        if key not in self._remembered:
            self._remembered[key] = (source, make())
        return self._remembered[key][1]

    def part(self, tensor: torch.Tensor, segments: tuple[str, ...], name: str) -> torch.Tensor:
        """The rows of one segment in a local tensor that holds ``segments``: a view along dim 1."""
        before = 0
        for segment in segments:
            if segment == name:
                return tensor.narrow(1, before, self.rows[name][self.rank])
            before += self.rows[segment][self.rank]
        raise KeyError(name)


def gather(tensor: torch.Tensor, rows: tuple[int, ...], comm: Comm) -> torch.Tensor | None:
    """Collect local rows (B, S_local, C) on rank 0 of ``comm``: (B, S, C) there, None on the others."""
    if comm.size == 1:
        return tensor
    batch, _, width = tensor.shape
    sent = tensor.reshape(-1)
    if comm.rank:
        comm.all_to_all(tensor.new_empty(0), sent, [0] * comm.size, [sent.numel()] + [0] * (comm.size - 1))
        return None
    sizes = [batch * count * width for count in rows]
    received = tensor.new_empty(sum(sizes))
    comm.all_to_all(received, sent, sizes, [sent.numel()] + [0] * (comm.size - 1))
    return torch.cat([piece.view(batch, count, width) for piece, count in zip(received.split(sizes), rows, strict=True)], dim=1)
