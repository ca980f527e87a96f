"""SageAttention 3 (arXiv 2505.11594): FP4 on Blackwell. Faster and coarser than version 2, so only on request.

The setting `sage` is one, where version 1 and 2 are missing.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch

from ..kernel import expand_kv
from .base import HALF, Backend, Request, load, nvidia_only

_CAPABILITIES = ((10, 0), (12, 0), (12, 1))


@lru_cache(maxsize=1)
def _module() -> ModuleType | str:
    return load("sageattn3", "sageattn3_blackwell")


def _probe() -> str | None:
    module = _module()
    return module if isinstance(module, str) else None


def _refuse(request: Request) -> str | None:
    if reason := nvidia_only(request, (10, 0)):
        return reason
    if request.capability not in _CAPABILITIES:
        return f"it has no kernel for compute capability {request.capability[0]}.{request.capability[1]}"
    if request.dtype not in HALF:
        return f"it takes float16 and bfloat16, not {request.dtype}"
    if request.head_dim not in (64, 128):
        return f"it takes head dims 64 and 128, not {request.head_dim}"
    if request.mask != "none":
        return "it takes no mask"
    if request.has_scale:
        return "it ignores a given scale"
    return None


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None, scale: float | None) -> torch.Tensor:
    """``sageattn3_blackwell``: (B, H, S, D), as many key as query heads; it subtracts the mean of k in place."""
    module = _module()
    assert isinstance(module, ModuleType), "probed first"
    heads = k.shape[1]
    k, v = expand_kv(q, k, v)
    if heads == q.shape[1]:
        k = k.clone(memory_format=torch.contiguous_format)
    return module.sageattn3_blackwell(q, k, v, is_causal=False)


BACKEND = Backend(
    "sage3",
    False,
    "build sageattention3_blackwell from https://github.com/thu-ml/SageAttention",
    _probe,
    _refuse,
    run,
    on_request=True,
)
