"""Tokens brought together on the first rank, in their natural order, and handed out again.

For code that only the first rank has, where every rank is in the middle of a block or of an attention call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .cut import Cut, Segments, TokenError
from .mesh import Comm


def counts(cut: Cut, segments: Segments, *, attended: bool = True) -> tuple[int, ...]:
    """Rows on each rank of a tensor that holds ``segments``: as attention sees them, or as blocks hold them."""
    return cut.joint(segments).rows if attended else tuple(map(sum, zip(*(cut.rows[name] for name in segments), strict=True)))


def order(cut: Cut, segments: Segments, device: torch.device, *, attended: bool = True) -> torch.Tensor:
    """Natural positions of the rows of all ranks, rank by rank: int64 on ``device``, made once a forward."""
    key = ("order", segments, attended, cut.joint(segments), device)
    return cut.remember(key, None, lambda: _order(cut, segments, attended).to(device))


def _order(cut: Cut, segments: Segments, attended: bool) -> torch.Tensor:
    pieces: list[list[torch.Tensor]] = [[] for _ in range(cut.ranks)]
    start = 0
    for name in segments:
        rows = cut.joint((name,)).rows if attended and name not in cut.grids else cut.rows[name]
        before, after = cut.grids.get(name, (1, 1)) if attended else (1, 1)
        total = before * sum(rows) * after
        grid = torch.arange(start, start + total).view(before, sum(rows), after)
        for rank, piece in enumerate(grid.split(list(rows), dim=1)):
            pieces[rank].append(piece.flatten())
        start += total
    return torch.cat([piece for of_rank in pieces for piece in of_rank])


def collect(cut: Cut, comm: Comm, tensor: torch.Tensor, segments: Segments, dim: int = 1, *, attended: bool = True) -> torch.Tensor | None:
    """The whole of ``tensor``, whose ``dim`` holds this rank's rows of ``segments``: on the first rank, None on the others.

    Raises TokenError where it does not hold them.
    """
    rows = counts(cut, segments, attended=attended)
    if tensor.shape[dim] != rows[cut.rank]:
        raise TokenError(f"{tensor.shape[dim]} rows in dim {dim} of {tuple(tensor.shape)}, expected {rows[cut.rank]}")
    local = tensor.movedim(dim, 0).contiguous()
    width = local.shape[1:].numel()
    first = comm.rank == 0
    received = local.new_empty(sum(rows) * width if first else 0)
    comm.all_to_all(received, local.view(-1), [count * width * first for count in rows], [local.numel()] + [0] * (comm.size - 1))
    if not first:
        return None
    whole = received.view(-1, *local.shape[1:])
    natural = torch.empty_like(whole)
    natural[order(cut, segments, whole.device, attended=attended)] = whole
    return natural.movedim(0, dim).contiguous()


def hand_out(
    cut: Cut, comm: Comm, whole: torch.Tensor | None, like: torch.Tensor, segments: Segments, dim: int = 1, *, attended: bool = True
) -> torch.Tensor:
    """This rank's rows of what the first rank has whole; ``like``: a tensor of their shape and dtype."""
    rows = counts(cut, segments, attended=attended)
    shape = like.movedim(dim, 0).shape
    width = shape[1:].numel()
    sizes = [count * width * (comm.rank == 0) for count in rows]
    if whole is None:
        sent = like.new_empty(0)
    else:
        sent = whole.movedim(dim, 0)[order(cut, segments, whole.device, attended=attended)].contiguous().view(-1)
    received = like.new_empty(shape.numel())
    comm.all_to_all(received, sent, [shape.numel()] + [0] * (comm.size - 1), sizes)
    return received.view(shape).movedim(0, dim).contiguous()


@contextmanager
def whole_slice(options: dict[str, Any], cut: Cut, segments: Segments, stream: str) -> Iterator[None]:
    """While ``segments`` are whole, have ``img_slice`` of the transformer options say where ``stream`` stands in them."""
    local = options.get("img_slice")
    if local is None or stream not in segments:
        yield
        return
    start = sum(cut.lengths[name] for name in segments[: segments.index(stream)])
    options["img_slice"] = cut.image_slice or [start, start + cut.lengths[stream]]
    try:
        yield
    finally:
        options["img_slice"] = local
