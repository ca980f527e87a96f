"""Join attention over parts of the keys into attention over all of them.

The online softmax of FlashAttention (arXiv 2205.14135), as Ring Attention (arXiv 2310.01889) uses it between ranks: a
part's output weighs as much as its share of the sum of exponentials, which its log-sum-exp gives.
"""

from __future__ import annotations

import torch

NO_KEYS = float("-inf")
"""The log-sum-exp of a row that may attend to no key."""


def merge(
    out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor, *, masked: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join two results over disjoint keys, in float32.

    ``out`` ``(B, H, S, D)``, ``lse`` ``(B, H, S)``, both float32; ``part`` (any float dtype) and ``part_lse`` (float32) alike.
    A row with ``lse`` -inf has no weight, whatever its output holds; a row that is -inf in both stays as it is in ``out``.
    ``masked=False`` promises that no row of ``part`` is empty and saves a pass over it. NaN is kept, not hidden.
    """
    weight = torch.sigmoid(part_lse - lse).unsqueeze(-1)
    part = part.float()
    if masked:
        empty = (part_lse == NO_KEYS).unsqueeze(-1)
        # Kernels leave NaN in rows without keys, and 0 * NaN is NaN.
        part = part.masked_fill(empty, 0.0)
        weight = weight.masked_fill(empty, 0.0)
    return torch.lerp(out, part, weight), torch.logaddexp(lse, part_lse)


def first(part: torch.Tensor, part_lse: torch.Tensor, *, masked: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """The start of a running merge: ``part`` in float32, zero where it has no keys."""
    out = part.float()
    return (out.masked_fill((part_lse == NO_KEYS).unsqueeze(-1), 0.0) if masked else out), part_lse
