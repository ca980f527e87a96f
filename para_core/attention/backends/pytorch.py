"""PyTorch's own scaled dot product attention: takes every call, everywhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..kernel import expand_kv
from .base import HALF, Backend, Request, additive, mark_empty

_SCORES_AT_ONCE = 1 << 26
"""Most float32 scores that the plain path holds (256 MiB)."""
_BIAS_ALIGNMENT = 16
"""Elements: the memory-efficient CUDA kernel reads rows of the bias in such steps."""


def _probe() -> str | None:
    return None


def _refuse(request: Request) -> str | None:
    return None


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None, scale: float | None) -> torch.Tensor:
    """``F.scaled_dot_product_attention`` with torch's own choice of kernel."""
    if q.shape[1] == k.shape[1]:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if mask is not None:
        # With a mask and grouped queries torch falls to its slow path, which repeats the heads as well.
        k, v = expand_kv(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)


def run_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The fused kernel of the device that gives the log-sum-exp, else the plain formula in float32."""
    k, v = expand_kv(q, k, v)
    if q.device.type == "cpu":
        out, lse = _cpu(q, k, v, mask, scale)
    elif q.device.type == "cuda" and mask is None and _flash_takes(q):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)[:2]
    elif q.device.type == "cuda" and _efficient_takes(q):
        out, lse = _efficient(q, k, v, mask, scale)
    else:
        return plain(q, k, v, mask=mask, scale=scale)
    return out, mark_empty(lse[..., : q.shape[2]].float(), mask)


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula written out, in float32, some query rows at a time. Works on every device and dtype."""
    k, v = expand_kv(q, k, v)
    keys, values = k.float().transpose(-2, -1), v.float()
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    step = max(1, _SCORES_AT_ONCE // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    outs, lses = [], []
    for start in range(0, q.shape[2], step):
        scores = q[:, :, start : start + step].float() @ keys * factor
        if mask is not None:
            rows = mask if mask.shape[2] == 1 else mask[:, :, start : start + step]
            scores = scores + additive(rows, torch.float32)
        lse = scores.logsumexp(-1)
        # Without keys all scores are -inf, and -inf - -inf is NaN.
        weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
        outs.append((weights @ values).to(q.dtype))
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    bias = None if mask is None else additive(mask, q.dtype)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=bias, scale=scale)


def _flash_takes(q: torch.Tensor) -> bool:
    return (
        q.dtype in HALF
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and torch.version.hip is None
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def _efficient_takes(q: torch.Tensor) -> bool:
    return q.dtype in (*HALF, torch.float32) and q.shape[-1] % (4 if q.dtype == torch.float32 else 8) == 0 and torch.version.hip is None


def _efficient(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    bias = None
    if mask is not None:
        keys = k.shape[2]
        # Each row of the bias must start aligned: pad its memory, then show only the real columns.
        bias = F.pad(additive(mask, q.dtype), (0, -keys % _BIAS_ALIGNMENT))[..., :keys]
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], keys)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=scale)[:2]


BACKEND = Backend("pytorch", True, "comes with PyTorch", _probe, _refuse, run, run_lse)
