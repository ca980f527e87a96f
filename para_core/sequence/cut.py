"""The tokens of one forward: how long every segment is, who holds which rows, and the cuts themselves."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from .layout import Joint, balanced, weighted
from .mesh import Comm

Segments = tuple[str, ...]


class TokenError(RuntimeError):
    """A tensor does not have the rows that the plan and the first block say."""


class Cut:
    """State of one forward on one rank. Lengths are read off the first block's arguments by ``measure``.

    lengths: whole rows of each segment. rows: rows of each segment on each rank. grids: segments whose rows are each a
    grid of several tokens: how many before and after the cut dim. regathered: segments that are whole between blocks.
    image_slice: ``img_slice`` of the transformer options in whole rows, where a rule has changed it to local ones.
    exact: a rule has made a mask of calls that must not be quantised.
    """

    def __init__(self, rank: int, ranks: int, weights: Sequence[float] | None = None, regathered: Collection[str] = ()):
        self.rank, self.ranks, self.weights, self.regathered = rank, ranks, weights, regathered
        self.lengths: dict[str, int] = {}
        self.rows: dict[str, tuple[int, ...]] = {}
        self.grids: dict[str, tuple[int, int]] = {}
        self.image_slice: list[int] | None = None
        self.exact = False
        self._attended: dict[str, tuple[int, ...]] = {}
        self._pairs: dict[Any, Any] = {}
        self._remembered: dict[Any, tuple[Any, Any]] = {}

    def measure(self, segment: str, length: int, unit: int = 1, grid: tuple[int, int] = (1, 1)) -> None:
        """``unit``: rows that stay together."""
        if length % unit:
            raise TokenError(f"{length} rows of {segment} cannot be cut in units of {unit}")
        self.lengths[segment] = length
        units = length // unit
        shares = weighted(units, self.weights) if self.weights else balanced(units, self.ranks)
        self.rows[segment] = tuple(share * unit for share in shares)
        if grid != (1, 1):
            self.grids[segment] = grid
            self._attended[segment] = tuple(rows * grid[0] * grid[1] for rows in self.rows[segment])

    def attend(self, segment: str, rows: tuple[int, ...]) -> None:
        """Say that attention sees only the first ``rows`` of each rank's rows of ``segment``."""
        if self._attended.get(segment) != rows:
            self._attended[segment] = rows
            self._pairs.clear()

    def start(self, segment: str) -> int:
        """First row of ``segment`` that this rank holds."""
        return sum(self.rows[segment][: self.rank])

    def joint(self, segments: Segments) -> Joint:
        return Joint(tuple(self._attended.get(name) or self.rows[name] for name in segments))

    def pairs(self, joints: tuple[tuple[Segments, Segments], ...]) -> tuple[tuple[Joint, Joint], ...]:
        """The layouts of queries and keys, for each attention call in turn."""
        if joints not in self._pairs:
            self._pairs[joints] = tuple((self.joint(q), self.joint(kv)) for q, kv in joints)
        return self._pairs[joints]

    def width(self, segments: Segments, whole: Collection[str] = ()) -> int:
        """Rows of a tensor here that holds ``segments``, those in ``whole`` uncut."""
        return sum(self.lengths[name] if name in whole else self.rows[name][self.rank] for name in segments)

    def local(self, tensor: torch.Tensor, segments: Segments, dim: int, whole: Collection[str] | None = None) -> torch.Tensor:
        """This rank's rows of ``tensor``, whose ``dim`` holds ``segments`` in order. A view where it can be.

        ``whole``: the segments that are whole in it, by default all; the others are local already.
        """
        whole = segments if whole is None else whole
        total = self.width(segments, whole)
        if tensor.shape[dim] != total:
            raise TokenError(f"expected {total} rows of {'+'.join(segments)} in dim {dim} of {tuple(tensor.shape)}")
        if self.ranks == 1:
            return tensor
        pieces, base = [], 0
        for name in segments:
            rows = self.rows[name][self.rank]
            pieces.append(tensor.narrow(dim, base + (self.start(name) if name in whole else 0), rows))
            base += self.lengths[name] if name in whole else rows
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    def table(self, value, segments: Segments, dim: int):
        """Cut what stock code passes whole to every block; the cut is made once a forward. Sizes of 1 broadcast."""
        if isinstance(value, (tuple, list)):
            return type(value)(self.table(item, segments, dim) for item in value)
        if not isinstance(value, torch.Tensor) or self.ranks == 1 or value.shape[dim] == 1:
            return value
        return self.remember((id(value), segments, dim), value, lambda: self._table(value, segments, dim))

    def _table(self, value: torch.Tensor, segments: Segments, dim: int) -> torch.Tensor:
        before, after = self.grids.get(segments[0], (1, 1))
        length = self.lengths[segments[0]]
        if len(segments) == 1 and value.shape[dim] == before * length * after != length:  # the grid flattened
            dim %= value.ndim
            return self.local(value.unflatten(dim, (before, length, after)), segments, dim + 1).flatten(dim, dim + 2)
        return self.local(value, segments, dim)

    def remember(self, key, source, make: Callable[[], Any]):
        """``make()`` once a forward for each key; ``source`` is kept alive so that its id stays its own."""
        if self.ranks == 1:
            return source
        if key not in self._remembered:
            self._remembered[key] = (source, make())
        return self._remembered[key][1]

    def source(self, value):
        """What a table of ``table`` was cut from; ``value`` itself where it is none."""
        if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
            return type(value)(self.source(item) for item in value)
        return next((source for source, made in self._remembered.values() if made is value), value)

    def part(self, tensor: torch.Tensor, segments: Segments, name: str, dim: int = 1) -> torch.Tensor:
        """The rows of one segment in a local tensor that holds ``segments``: a view."""
        before = 0
        for segment in segments:
            if segment == name:
                return tensor.narrow(dim, before, self.rows[name][self.rank])
            before += self.rows[segment][self.rank]
        raise KeyError(name)


def gather(tensor: torch.Tensor, rows: tuple[int, ...], comm: Comm, dim: int = 1) -> torch.Tensor | None:
    """Join local rows along ``dim`` on rank 0 of ``comm``: the whole tensor there, None on the others."""
    return _gather(tensor, rows, comm, dim, everywhere=False)


def gather_all(tensor: torch.Tensor, rows: tuple[int, ...], comm: Comm, dim: int = 1) -> torch.Tensor:
    """Join local rows along ``dim`` on every rank of ``comm``."""
    whole = _gather(tensor, rows, comm, dim, everywhere=True)
    assert whole is not None
    return whole


def _gather(tensor: torch.Tensor, rows: tuple[int, ...], comm: Comm, dim: int, *, everywhere: bool) -> torch.Tensor | None:
    if comm.size == 1:
        return tensor
    local = tensor.movedim(dim, 0).contiguous()
    rest = local.shape[1:]
    own, width = local.numel(), rest.numel()
    receives = everywhere or comm.rank == 0
    sent_sizes = [own] * comm.size if everywhere else [own] + [0] * (comm.size - 1)
    received_sizes = [count * width if receives else 0 for count in rows]
    sent = local.view(-1)
    received = sent.new_empty(sum(received_sizes))
    comm.all_to_all(received, sent.repeat(comm.size) if everywhere else sent, received_sizes, sent_sizes)
    return received.view(sum(rows), *rest).movedim(0, dim).contiguous() if receives else None
