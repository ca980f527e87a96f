"""Attention over tokens that several ranks hold: the one function the rest of the pack calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..sequence.layout import Joint
from ..sequence.mesh import Mesh
from . import masks, ring, ulysses, unified
from .beside import Beside
from .call import Call, StockKernel
from .kernel import Kernel, NeedsLse, expand_kv
from .message import BYTES, Form
from .traffic import Traffic

__all__ = ["PLAIN", "Exchange", "NeedsLse", "Way", "attend", "attend_call"]


@dataclass(frozen=True)
class Way:
    """How a call's tensors travel; every rank must go the same way.

    ``wire``: q, k and v as bytes (see the module ``wire``). ``parts``: of the heads, one travels while another is computed; Ulysses only.
    """

    wire: bool = False
    parts: int = 1


PLAIN = Way()


@dataclass(eq=False)
class Exchange:
    """How one kind of attention call is shared: ranks, who holds which query and key rows, what computes.

    ``kernel`` may be None where every call brings its own.
    """

    mesh: Mesh
    q: Joint
    kv: Joint
    kernel: Kernel | None = None
    bytes: Form = BYTES
    """How q, k and v travel where a call's way says bytes."""
    traffic: Traffic = field(default_factory=Traffic)
    trades: ulysses.Trades = field(default_factory=dict, repr=False)
    index: dict[tuple[Joint, torch.device], torch.Tensor] = field(default_factory=dict, repr=False)
    """Rank-major permutations on their device; may be shared between exchanges."""


def attend(
    exchange: Exchange,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    *,
    kernel: Kernel | None = None,
    way: Way = PLAIN,
    beside: Beside | None = None,
) -> torch.Tensor:
    """Attention of this rank's query rows to the key rows of all ranks.

    q ``(B, H, S, D)``, k and v ``(B, Hkv, M, D)``: this rank's rows, any strides with a contiguous last dim, one dtype.
    ``mask``: ``(S, M)``, ``(B|1, S, M)`` or ``(B|1, H|1, S|1, M)``, bool (True = attend) or additive; S and M are either the
    whole lengths in natural order or this rank's rows. ``scale``: None means ``D ** -0.5``.
    Returns ``(B, H, S, D)``, memory ``(B, S, H, D)`` where rows were exchanged.

    ``beside``: launched while messages of Ulysses travel. Every rank of ``exchange.mesh.sequence`` must make the same call, the same
    ``way``; what is beside it is each rank's own. Raises ``NeedsLse`` for a ring with a kernel that has no log-sum-exp, ``ValueError``
    for sizes that do not fit the layout, ``RuntimeError`` where a peer fails.
    """
    chosen = kernel or exchange.kernel
    if chosen is None:
        raise ValueError("an exchange without a kernel needs one with every call")
    return _attend(exchange, chosen, q, k, v, mask, scale, way, beside)


def attend_call(exchange: Exchange | None, call: Call, kernel: Kernel, way: Way = PLAIN, beside: Beside | None = None) -> torch.Tensor:
    """Answer an override call, in the shape its caller expects; ``exchange`` None keeps it on this rank.

    A call that stays on this rank goes to a stock kernel with its original arguments: bit-identical to stock.
    """
    if exchange is None or exchange.mesh.sequence.size == 1:
        if isinstance(kernel, StockKernel) and kernel.call is call:
            return kernel.original()
        return call.output(kernel.run(call.q, call.k, call.v, mask=call.mask, scale=call.scale))
    return call.output(attend(exchange, call.q, call.k, call.v, call.mask, call.scale, kernel=kernel, way=way, beside=beside))


def _attend(
    exchange: Exchange,
    kernel: Kernel,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    way: Way,
    beside: Beside | None,
) -> torch.Tensor:
    mesh, traffic = exchange.mesh, exchange.traffic
    if mesh.sequence.size == 1:
        return kernel.run(q, k, v, mask=mask, scale=scale)
    _check(exchange, q, k, v)
    if mesh.ring.size > 1 and not kernel.has_lse:
        raise NeedsLse("a ring needs an attention kernel that gives its log-sum-exp; this one does not: use Ulysses alone")
    traffic.calls += 1
    if mesh.ulysses.size > 1 and k.shape[1] != q.shape[1] and k.shape[1] % mesh.ulysses.size:
        k, v = expand_kv(q, k, v)
    heads = ulysses.split_heads(q.shape[1], k.shape[1], mesh.ulysses.size, mesh.head_speeds)
    if mask is not None:
        mask = masks.exchanged_mask(mask, mesh, exchange.q, exchange.kv, heads.own(mesh.ulysses.rank), exchange.index, traffic)
    common: dict[str, Any] = {"mask": mask, "scale": scale, "traffic": traffic, "wire": exchange.bytes if way.wire else None}
    if mesh.ulysses.size == 1:
        return ring.attend(mesh.ring, kernel, q, k, v, kv_rows=exchange.kv.rows, **common)
    rows: dict[str, Any] = {"q_rows": exchange.q.rows, "kv_rows": exchange.kv.rows, "heads": heads}
    common |= {"trades": exchange.trades, "beside": beside}
    if mesh.ring.size == 1:
        return ulysses.attend(mesh.ulysses, kernel, q, k, v, **rows, **common, parts=way.parts)
    return unified.attend(mesh, kernel, q, k, v, **rows, **common)


def _check(exchange: Exchange, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Refuse what would deadlock or be cast silently in a shared buffer."""
    rank = exchange.mesh.sequence.rank
    q_rows, kv_rows = exchange.q.rows[rank], exchange.kv.rows[rank]
    if q.shape[2] != q_rows or k.shape[2] != kv_rows:
        raise ValueError(f"rank {rank} should have {q_rows} query and {kv_rows} key rows, got {q.shape[2]} and {k.shape[2]}")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(f"query {tuple(q.shape)}, key {tuple(k.shape)} and value {tuple(v.shape)} do not fit one exchange")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"query, key and value must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
