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
from .traffic import Traffic
from .ulysses import unpack


def pack(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """k and v ``(B, h, M, D)`` as the one message that travels: contiguous ``(M, B, 2 * h, D)``."""
    return torch.cat((k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3)), dim=2)


def attend(
    comm: Comm,
    kernel: Kernel,
    q: torch.Tensor,
    kv: torch.Tensor,
    *,
    kv_rows: Sequence[int],
    mask: torch.Tensor | None,
    scale: float | None,
    traffic: Traffic,
) -> torch.Tensor:
    """q ``(B, H, S, D)`` of this rank, ``kv`` packed ``(M, B, 2 * h, D)`` of this rank -> ``(B, H, S, D)`` in q's dtype.

    ``kv_rows``: M on each rank of the ring. ``mask``: ``(B|1, H|1, S|1, sum of kv_rows)``, columns in rank order. The next
    block is on its way while the current one is computed. Rows without any key are zero. Raises ``NeedsLse``.

    With an additive mask of huge finite values a row may have *every* key masked; then the parts weigh alike instead of by
    their length, as log(M) is lost beside such numbers in float32. Such rows carry nothing.
    """
    if not kernel.has_lse:
        raise NeedsLse("ring attention joins partial results by their log-sum-exp, which this attention kernel does not give; use Ulysses")
    size, rank = comm.size, comm.rank
    starts = [sum(kv_rows[:source]) for source in range(size)]
    computes = q.numel() > 0
    out = lse = None
    for step in range(size):
        source = (rank - step) % size
        wait = None
        if step + 1 < size:
            coming = kv.new_empty(kv_rows[(source - 1) % size], *kv.shape[1:])
            wait = comm.shift(kv, (rank + 1) % size, coming, (rank - 1) % size)
            traffic.bytes += kv.numel() * kv.element_size()
        if computes and kv_rows[source]:
            columns = None if mask is None else mask[..., starts[source] : starts[source] + kv_rows[source]]
            part, part_lse = kernel.run_lse(q, *unpack(kv), mask=columns, scale=scale)
            masked = mask is not None
            if out is None or lse is None:
                out, lse = first(part, part_lse, masked=masked)
            else:
                out, lse = merge(out, lse, part, part_lse, masked=masked)
        if wait is not None:
            wait()
            kv = coming
    return torch.zeros_like(q) if out is None else out.to(q.dtype)
