"""Ring attention: keys and values travel round the ranks while each rank computes (arXiv 2310.01889).

Every rank keeps its query rows and, step by step, sees the keys and values of all ranks; the partial results are joined
by their log-sum-exp in float32. Rows may be uneven, and a rank may have none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..sequence.mesh import Comm
from .kernel import Kernel, NeedsLse
from .merge import first, merge
from .message import PARTS, Form, Piece
from .traffic import Traffic


def attend(
    comm: Comm,
    kernel: Kernel,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    kv_rows: Sequence[int],
    mask: torch.Tensor | None,
    scale: float | None,
    traffic: Traffic,
    wire: Form | None = None,
) -> torch.Tensor:
    """q ``(B, H, S, D)``, k and v ``(B, h, M, D)`` of this rank -> ``(B, H, S, D)`` in q's dtype.

    ``kv_rows``: M on each rank of the ring. ``mask``: ``(B|1, H|1, S|1, sum of kv_rows)``, columns in rank order. The next
    block is on its way while the current one is computed. ``wire``: k and v travel in this form; they are
    written once, by the rank that they belong to. Rows without any key are zero. Raises ``NeedsLse``.

    With an additive mask of huge finite values a row may have *every* key masked; then the parts weigh alike instead of by
    their length, as log(M) is lost beside such numbers in float32. Such rows carry nothing.
    """
    if not kernel.has_lse:
        raise NeedsLse("ring attention joins partial results by their log-sum-exp, which this attention kernel does not give; use Ulysses")
    size, rank = comm.size, comm.rank
    batch, heads, _, dim = k.shape
    form = wire or PARTS
    pieces = [Piece(batch, 0, rows, 0, heads, dim) for rows in kv_rows]
    starts = [sum(kv_rows[:source]) for source in range(size)]
    message = k.new_empty(form.size(pieces[rank]), dtype=form.dtype or k.dtype)
    form.write(message[None], pieces[rank], _rows_first(q)[:, :0, :, :0], _rows_first(k), _rows_first(v))
    out = lse = None
    for step in range(size):
        source = (rank - step) % size
        wait = None
        if step + 1 < size:
            coming = message.new_empty(form.size(pieces[(source - 1) % size]))
            wait = comm.shift(message, (rank + 1) % size, coming, (rank - 1) % size)
            traffic.bytes += message.numel() * message.element_size()
        if q.numel() and kv_rows[source]:
            if step:
                k, v = _read(form, message, pieces[source], like=q)
            columns = None if mask is None else mask[..., starts[source] : starts[source] + kv_rows[source]]
            part, part_lse = kernel.run_lse(q, k, v, mask=columns, scale=scale)
            masked = mask is not None
            if out is None or lse is None:
                out, lse = first(part, part_lse, masked=masked)
            else:
                out, lse = merge(out, lse, part, part_lse, masked=masked)
        if wait is not None:
            wait()
            message = coming
    return torch.zeros_like(q) if out is None else out.to(q.dtype)


def _read(form: Form, message: torch.Tensor, piece: Piece, *, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v ``(B, h, M, D)`` of a message; views of it where nothing has to be computed."""
    kv = message.view(piece.kv) if form is PARTS else like.new_empty(piece.kv)
    k, v = kv.chunk(2, dim=2)
    if form is not PARTS:
        form.read(message[None], piece, k[None, :, :, :0], k[None], v[None])
    return k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)


def _rows_first(tensor: torch.Tensor) -> torch.Tensor:
    """``(B, H, S, D)`` as ``(1, S, B, H, D)``."""
    return tensor.permute(2, 0, 1, 3)[None]
