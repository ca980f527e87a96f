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
    ``index`` keeps the permutations on the device. A query dim of size 1 is broadcast. Raises ``ValueError`` for sizes that
    fit neither the whole sequence nor this rank's share, and for a mask cut in both dims: no rank has the rest of it.
    """
    mask = as_4d(mask)
    size, rank = mesh.ulysses.size, mesh.sequence.rank
    group = slice(mesh.ring.rank * size, (mesh.ring.rank + 1) * size)
    whole_rows = mask.shape[_QUERY] in (1, q.total)
    # Were 1 a rank's share as well as a broadcast, or all rows on one rank, the ranks could read such masks differently and
    # wait for each other.
    local_rows = not whole_rows and mask.shape[_QUERY] == q.rows[rank] and not {1, q.total} & set(q.rows)
    whole_columns = mask.shape[_KEY] == kv.total
    local_columns = not whole_columns and mask.shape[_KEY] == kv.rows[rank] and kv.total not in kv.rows
    if not (whole_rows or local_rows):
        raise ValueError(_misfit("query rows", mask, _QUERY, q, mesh))
    if not (whole_columns or (local_columns and whole_rows)):
        raise ValueError(_misfit("key columns", mask, _KEY, kv, mesh))
    if local_columns:
        mask = _gather(mask, _KEY, mesh.sequence, kv.rows, traffic)
    if local_rows:
        mask = _gather(mask, _QUERY, mesh.ulysses, q.rows[group], traffic)
    # Heads only now: what was gathered is for the receiver's heads, not the sender's.
    if mask.shape[1] != 1:
        mask = mask[:, heads]
    if whole_rows and mask.shape[_QUERY] != 1:
        start, stop = sum(q.rows[: group.start]), sum(q.rows[: group.stop])
        mask = mask[:, :, start:stop] if q.natural else mask.index_select(_QUERY, _order(q, mask.device, index)[start:stop])
    if whole_columns and not kv.natural:
        mask = mask.index_select(_KEY, _order(kv, mask.device, index))
    return mask


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
    sent = local.flatten().view(torch.uint8).repeat(comm.size)
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
