"""The flash-attn package (FlashAttention-2, arXiv 2307.08691)."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch

from .base import HALF, Backend, Request, load, nvidia_only


@lru_cache(maxsize=1)
def _module() -> ModuleType | str:
    return load("flash_attn", "flash_attn_func")


def _probe() -> str | None:
    module = _module()
    return module if isinstance(module, str) else None


def _refuse(request: Request) -> str | None:
    if reason := nvidia_only(request, (8, 0)):
        return reason
    if request.dtype not in HALF:
        return f"it takes float16 and bfloat16, not {request.dtype}"
    if request.head_dim > 256:
        return f"it takes head dims up to 256, not {request.head_dim}"
    if request.mask != "none":
        return "it takes no mask"
    return None


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None, scale: float | None) -> torch.Tensor:
    """``flash_attn_func``, which wants ``(B, S, H, D)``; grouped queries are its own."""
    out = _function()(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), softmax_scale=scale, causal=False)
    return out.transpose(1, 2)


def run_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with its softmax statistics, ``(B, H, S)`` float32 natural log."""
    out, lse, _ = _function()(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), softmax_scale=scale, causal=False, return_attn_probs=True
    )
    return out.transpose(1, 2), lse[..., : q.shape[2]]


def _function():
    module = _module()
    assert isinstance(module, ModuleType), "probed first"
    return module.flash_attn_func


BACKEND = Backend("flash", True, "pip install flash-attn --no-build-isolation", _probe, _refuse, run, run_lse)
