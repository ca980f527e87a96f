"""SageAttention (arXiv 2410.02367, 2411.10958): q and k in int8, v in fp8 or fp16.

Version 1.x is Triton and gives no log-sum-exp; 2.x does (natural log, corrected for its smoothing of k). ``sageattn`` accepts
and ignores unknown keywords (attn_mask, scale), so nothing is passed that its signature does not name.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from types import ModuleType

import torch

from .base import HALF, Backend, Request, load, nvidia_only

_KERNELS_2 = ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (12, 1))
"""Compute capabilities that version 2.x dispatches on; it raises for all others."""
_HEAD_DIMS_1 = (64, 96, 128)


@lru_cache(maxsize=1)
def _module() -> ModuleType | str:
    return load("sageattention", "sageattn")


@lru_cache(maxsize=1)
def _gives_lse() -> bool:
    """Version 2.x, told by its signature: forks and source builds do not agree on version strings."""
    return "return_lse" in inspect.signature(_function()).parameters


def _probe() -> str | None:
    module = _module()
    return module if isinstance(module, str) else None


def _refuse(request: Request) -> str | None:
    if reason := nvidia_only(request, (8, 0)):
        return reason
    if request.dtype not in HALF:
        return f"it takes float16 and bfloat16, not {request.dtype}"
    if request.mask != "none":
        return "it takes no mask"
    if _gives_lse():
        if request.capability not in _KERNELS_2:
            return f"it has no kernel for compute capability {request.capability[0]}.{request.capability[1]}"
        return None if request.head_dim <= 128 else f"it takes head dims up to 128, not {request.head_dim}"
    if request.needs_lse:
        return "version 1 gives no log-sum-exp; version 2 does"
    return None if request.head_dim in _HEAD_DIMS_1 else f"version 1 takes head dims 64, 96 and 128, not {request.head_dim}"


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None, scale: float | None) -> torch.Tensor:
    """``sageattn`` in its (B, S, H, D) layout, which is what the caller's reshape wants."""
    if not _gives_lse():
        # Version 1 subtracts the mean of k in place.
        k = k.clone(memory_format=torch.contiguous_format)
    out = _function()(_rows_first(q), _rows_first(k), _rows_first(v), tensor_layout="NHD", is_causal=False, sm_scale=scale)
    return out.transpose(1, 2)


def run_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with ``(B, H, S)`` float32 natural log-sum-exp. K and V of a ring are copied where they are slices of a message.

    Wrong reads were reported for slices of a gathered buffer (huggingface/diffusers issue 13506).
    """
    k, v = (tensor if tensor.storage_offset() == 0 else tensor.contiguous().clone() for tensor in (k, v))
    out, lse = _function()(
        _rows_first(q), _rows_first(k), _rows_first(v), tensor_layout="NHD", is_causal=False, sm_scale=scale, return_lse=True
    )
    return out.transpose(1, 2), lse.float()


def _rows_first(tensor: torch.Tensor) -> torch.Tensor:
    """``(B, H, S, D)`` as ``(B, S, H, D)`` whose last dim is contiguous."""
    tensor = tensor.transpose(1, 2)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _function():
    module = _module()
    assert isinstance(module, ModuleType), "probed first"
    return module.sageattn


BACKEND = Backend(
    "sage",
    False,
    "pip install git+https://github.com/thu-ml/SageAttention --no-build-isolation for version 2 (needs nvcc), "
    "or pip install sageattention for version 1 (Triton, no ring)",
    _probe,
    _refuse,
    run,
    run_lse,
)
