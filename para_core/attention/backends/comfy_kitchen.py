"""comfy-kitchen's int8 attention: comes prebuilt with current ComfyUI, for NVIDIA from sm75 on and AMD with matrix cores."""

from __future__ import annotations

from functools import lru_cache
from importlib import metadata
from types import ModuleType

import torch

from .base import HALF, Backend, Request, load

_FIRST = "0.2.40"
"""A version that has int8 attention; 0.2.26, which ComfyUI 0.30.0 pins, has none."""


@lru_cache(maxsize=1)
def _module() -> ModuleType | str:
    module = load("comfy_kitchen")
    if isinstance(module, ModuleType) and not hasattr(module, "int8_attention"):
        return f"comfy-kitchen {_version()} has no int8 attention; {_FIRST} has"
    return module


def _version() -> str:
    try:
        return metadata.version("comfy-kitchen")
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _probe() -> str | None:
    module = _module()
    return module if isinstance(module, str) else None


@lru_cache(maxsize=1)
def _kernel_available() -> bool:
    """Whether the compiled kernel fits the current device; asked only once a CUDA or HIP tensor exists."""
    module = _module()
    return isinstance(module, ModuleType) and bool(module.int8_attention_is_available())


def _refuse(request: Request) -> str | None:
    if request.device_type not in ("cuda", "hip"):
        return f"it runs on NVIDIA and AMD GPUs, not on {request.device_type}"
    if request.device_type == "cuda" and request.capability < (7, 5):
        return f"it needs compute capability 7.5, this device has {request.capability[0]}.{request.capability[1]}"
    if request.dtype not in HALF:
        # It takes float32 as well, but computes it in bfloat16, which is not what a float32 model wants.
        return f"it takes float16 and bfloat16, not {request.dtype}"
    if request.head_dim > 256:
        return f"it takes head dims up to 256, not {request.head_dim}"
    if request.needs_lse:
        return "it gives no log-sum-exp"
    return None if _kernel_available() else "its compiled kernel does not fit this device"


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None, scale: float | None) -> torch.Tensor:
    """``int8_attention``: (B, H, S, D), grouped queries and 4-D masks are its own; the last dims must be contiguous."""
    module = _module()
    assert isinstance(module, ModuleType), "probed first"
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    return module.int8_attention(q, k, v, scale=scale, attn_mask=mask)


BACKEND = Backend("comfy-kitchen", False, f'pip install -U "comfy-kitchen>={_FIRST}"', _probe, _refuse, run)
