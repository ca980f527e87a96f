"""Attention masks under an exchange: key columns and query rows in the order the tokens arrive.

A mask comes as the model made it for whole sequences in natural order, or already with this rank's rows or columns only.
Shapes: B batch, H heads, S query rows, M key rows; bool (True = attend) or additive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..sequence.layout import Joint
from ..sequence.mesh import Comm, Mesh
from .traffic import Traffic

_QUERY, _KEY = 2, 3


def as_4d(mask: torch.Tensor) -> torch.Tensor:
    """``(S, M)``, ``(B, S, M)`` or ``(B, H, S, M)`` as a 4-D view (dims of size 1 stay 1)."""
    if mask.ndim == 2:
        return mask[None, None]
    if mask.ndim == 3:
        return mask[:, None]
    if mask.ndim == 4:
        return mask
    raise ValueError(f"an attention mask has 2 to 4 dimensions, got shape {tuple(mask.shape)}")


def exchanged_mask(
    mask: torch.Tensor,
    mesh: Mesh,
    q: Joint,
    kv: Joint,
    heads: slice,
    index: dict[tuple[Joint, torch.device], torch.Tensor],
    traffic: Traffic,
) -> torch.Tensor:
    """The part of ``mask`` that this rank's kernel needs: ``(B|1, own heads|1, group rows|1, M)``, rows and columns rank-major.

    The rows are those of this rank's Ulysses group, the columns all keys. ``heads``: this rank's query heads.
    ``index`` keeps the permutations on the device. Query dims of size 1 are broadcast. Raises ``ValueError`` for sizes that
    fit neither the whole sequence nor this rank's share.
    """
    mask = as_4d(mask)
    if mask.shape[1] != 1:
        mask = mask[:, heads]
    ranks = mesh.ulysses.size
    group = range(mesh.ring.rank * ranks, (mesh.ring.rank + 1) * ranks)
    start, stop = sum(q.rows[: group.start]), sum(q.rows[: group.stop])
    if mask.shape[_QUERY] != 1:
        if mask.shape[_QUERY] == q.total:
            mask = mask[:, :, start:stop] if q.natural else mask.index_select(_QUERY, _order(q, mask.device, index)[start:stop])
        elif mask.shape[_QUERY] == q.rows[mesh.sequence.rank] and 1 not in q.rows:
            mask = _gather(mask, _QUERY, mesh.ulysses, q.rows[group.start : group.stop], traffic)
        else:
            raise ValueError(_misfit("query rows", mask, _QUERY, q, mesh))
    if mask.shape[_KEY] == kv.total:
        return mask if kv.natural else mask.index_select(_KEY, _order(kv, mask.device, index))
    # With all keys on one rank, the others could not tell a local mask from a wrong one and would not join the exchange.
    if mask.shape[_KEY] == kv.rows[mesh.sequence.rank] and kv.total not in kv.rows:
        return _gather(mask, _KEY, mesh.sequence, kv.rows, traffic)
    raise ValueError(_misfit("key columns", mask, _KEY, kv, mesh))


def _order(joint: Joint, device: torch.device, index: dict[tuple[Joint, torch.device], torch.Tensor]) -> torch.Tensor:
    """``joint.rank_major`` on ``device``, copied there once."""
    order = index.get((joint, device))
    if order is None:
        order = index[joint, device] = joint.rank_major.to(device)
    return order


def _gather(mask: torch.Tensor, dim: int, comm: Comm, rows: Sequence[int], traffic: Traffic) -> torch.Tensor:
    """Join what the ranks of ``comm`` hold along ``dim`` (``rows[r]`` on rank r)."""
    local = mask.movedim(dim, 0).contiguous()
    width = math.prod(local.shape[1:]) * mask.element_size()
    # Bytes travel: not every backend of torch.distributed takes bool tensors.
    sent = local.view(torch.uint8).flatten().repeat(comm.size)
    received = sent.new_empty(sum(rows) * width)
    own = len(local) * width
    comm.all_to_all(received, sent, [count * width for count in rows], [own] * comm.size)
    traffic.mask_bytes += own * (comm.size - 1)
    return received.view(mask.dtype).view(sum(rows), *local.shape[1:]).movedim(0, dim)


def _misfit(what: str, mask: torch.Tensor, dim: int, joint: Joint, mesh: Mesh) -> str:
    return (
        f"the attention mask {tuple(mask.shape)} has {mask.shape[dim]} {what}; expected {joint.total} (whole)"
        f" or {joint.rows[mesh.sequence.rank]} (this rank's) of {joint.rows}"
    )
