"""cuDNN's fused attention, through PyTorch: the fastest exact kernel on Hopper."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernel import expand_kv
from .base import HALF, Backend, Request, nvidia_only


@lru_cache(maxsize=1)
def _probe() -> str | None:
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    if not torch.backends.cudnn.is_available():
        return "this PyTorch has no cuDNN"
    if not hasattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention"):
        return f"PyTorch {torch.__version__} has no cuDNN attention"
    return None


def _refuse(request: Request) -> str | None:
    if reason := nvidia_only(request, (8, 0)):
        return reason
    if request.dtype not in HALF:
        return f"it takes float16 and bfloat16, not {request.dtype}"
    if request.head_dim % 8 or request.head_dim > 128:
        return f"it takes head dims up to 128 in steps of 8, not {request.head_dim}"
    if request.mask != "none":
        # PyTorch can hand a bias to cuDNN; rows without keys and broadcast strides have not been verified.
        return "it takes no mask"
    if request.kv_len < 2:
        return "it takes no single key"
    return None


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None, scale: float | None) -> torch.Tensor:
    """``F.scaled_dot_product_attention`` with cuDNN as the only choice; ``RuntimeError`` where it does not fit."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def run_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operation below; ``mask`` is None (see ``_refuse``)."""
    k, v = expand_kv(q, k, v)
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, mask, True, scale=scale)[:2]
    # (B, H, S, 1) in some versions of PyTorch.
    return out, lse.reshape(q.shape[:3])


BACKEND = Backend("cudnn", True, "pip install a CUDA build of PyTorch, see https://pytorch.org/get-started", _probe, _refuse, run, run_lse)
