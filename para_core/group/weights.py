"""Weights from rank 0 to every other rank: in buckets, by broadcast, with a fingerprint that all ranks must share.

Tensors travel from device to device. A rank holds no more of them than its model and the bucket that is arriving.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..sequence.mesh import Comm
from .codec import pack, unpack

BUCKET = 64 * 2**20  # bytes: large enough for full link speed, small beside any card

Row = list[Any]
"""A tensor to come: [name, shape, dtype]."""


@dataclass(frozen=True)
class Unit:
    """Tensors that arrive together, such as a layer's. ``read`` makes them when their turn comes, in the order of ``rows``."""

    rows: list[Row]
    read: Callable[[], Sequence[torch.Tensor]]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for _, shape, dtype in self.rows)


def buckets(units: Iterable[Unit]) -> Iterator[list[Unit]]:
    """Runs of units of about ``BUCKET`` bytes, in order; a larger unit travels alone."""
    bucket: list[Unit] = []
    size = 0
    for unit in units:
        if bucket and size + unit.size > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(unit)
        size += unit.size
    if bucket:
        yield bucket


def manifest(units: Iterable[Unit]) -> list[list[Row]]:
    """What ``receive`` must expect: the rows of every bucket."""
    return [[row for unit in bucket for row in unit.rows] for bucket in buckets(units)]


def fingerprint(buffer: torch.Tensor) -> int:
    """Sum of a flat uint8 buffer's bytes, read as int64 words where they fit, modulo 2^64."""
    words = buffer[: buffer.numel() // 8 * 8].view(torch.int64)
    return (int(words.sum()) + int(buffer[words.numel() * 8 :].sum())) % 2**64


def share(units: Iterable[Unit], comm: Comm, device: torch.device) -> int:
    """Rank 0's side: broadcast every bucket over ``comm``. Returns the fingerprint of everything sent."""
    total = 0
    for bucket in buckets(units):
        buffer, layout = pack([tensor for unit in bucket for tensor in unit.read()], device)
        if [[shape, dtype] for unit in bucket for _, shape, dtype in unit.rows] != [
            [shape, getattr(torch, name)] for name, shape, _ in layout
        ]:
            raise RuntimeError(f"weights changed while they were sent, near {bucket[0].rows[0][0]}")
        comm.broadcast(buffer)
        comm.settle()
        total += fingerprint(buffer)
    return total % 2**64


def receive(expected: list[list[Row]], comm: Comm, device: torch.device) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
    """The other ranks' side, bucket by bucket: tensors by name, as views of one buffer on ``device``, and its fingerprint."""
    for bucket in expected:
        empty, layout = pack([torch.empty(shape, dtype=dtype, device="meta") for _, shape, dtype in bucket])
        buffer = torch.empty(empty.numel(), dtype=torch.uint8, device=device)
        comm.broadcast(buffer)
        comm.settle()
        yield dict(zip([name for name, _, _ in bucket], unpack(buffer, layout), strict=True)), fingerprint(buffer)
