"""Rotary position embeddings written out for the compiler.

ComfyUI computes them with operations of comfy-kitchen, which a compiler cannot look into: they would stand alone between
the norm before and the attention after, and run as many small kernels where that package has no compiled one. As formulas
they are fused with the norm. Formulas: RoFormer (arXiv 2104.09864); RMS norm: arXiv 1910.07467.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F


def rotate(x: torch.Tensor, table: torch.Tensor, *, halves: bool = False) -> torch.Tensor:
    """Rotate pairs of the last dim of ``x`` ``(..., D)``; dtype of ``x``, computed in the table's.

    ``table`` ``(..., D / 2, 2, 2)``, broadcastable: a rotation matrix a pair. Pairs are neighbours, or with ``halves`` an
    element of the first half and the one at its place in the second.
    """
    if x.ndim > 2 and table.ndim > 2 and x.shape[2] != 1 and table.shape[2] > x.shape[2]:
        table = table[:, :, : x.shape[2]]
    pairs = x.unflatten(-1, (2, -1) if halves else (-1, 2)).to(table.dtype)
    # Each element times its own factor, plus its partner times another: elements stay where they are, so that a compiler
    # keeps the norm before and this in one kernel. Sums of separate rows, stacked, made it write what is between them.
    own, cross = table.diagonal(dim1=-2, dim2=-1), table.flip(-1).diagonal(dim1=-2, dim2=-1)
    if halves:
        own, cross = own.transpose(-1, -2), cross.transpose(-1, -2)
    return (own * pairs + cross * pairs.flip(-2 if halves else -1)).flatten(-2).to(x.dtype)


def norm_and_rotate(
    x: torch.Tensor, table: torch.Tensor, scale: torch.Tensor, epsilon: float, rotated: int = 0, *, halves: bool = False
) -> torch.Tensor:
    """RMS norm over the last dim, then ``rotate`` of its first ``rotated`` elements (0: all)."""
    x = F.rms_norm(x, x.shape[-1:], weight=scale, eps=epsilon)
    if rotated in (0, x.shape[-1]):
        return rotate(x, table, halves=halves)
    return torch.cat((rotate(x[..., :rotated], table, halves=halves), x[..., rotated:]), -1)


def _both(q: torch.Tensor, k: torch.Tensor, table: torch.Tensor, *, halves: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    return rotate(q, table, halves=halves), rotate(k, table, halves=halves)


def _norm_both(
    q: torch.Tensor,
    k: torch.Tensor,
    table: torch.Tensor,
    q_scale: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    epsilon: float = 1e-6,
    rotated: int = 0,
    *,
    halves: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    k_scale = q_scale if k_scale is None else k_scale
    return (
        norm_and_rotate(q, table, q_scale, epsilon, rotated, halves=halves),
        norm_and_rotate(k, table, k_scale, epsilon, rotated, halves=halves),
    )


def _norm_one(x: torch.Tensor, table: torch.Tensor, scale: torch.Tensor, epsilon: float = 1e-6, *, halves: bool = False) -> torch.Tensor:
    return norm_and_rotate(x, table, scale, epsilon, halves=halves)


FORMULAS: dict[str, Callable[..., Any]] = {
    "apply_rope": _both,
    "apply_rope1": rotate,
    "apply_rope_split_half": partial(_both, halves=True),
    "apply_rope_split_half1": partial(rotate, halves=True),
    "rms_rope": _norm_both,
    "rms_rope1": _norm_one,
    "rms_rope_split_half": partial(_norm_both, halves=True),
    "rms_rope_split_half1": partial(_norm_one, halves=True),
}
"""Operation of comfy-kitchen -> the formula with its arguments."""


@lru_cache(maxsize=1)
def decompositions() -> dict[Any, Callable]:
    """The formulas by operation, for those that the installed comfy-kitchen has."""
    namespace = torch.ops.comfy_kitchen
    return {getattr(namespace, name).default: formula for name, formula in FORMULAS.items() if hasattr(namespace, name)}
