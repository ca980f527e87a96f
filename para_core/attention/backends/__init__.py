"""The local attention kernels. Adding one = one file that defines ``BACKEND``, and its line here."""

from __future__ import annotations

from . import comfy_kitchen, cudnn, flash, pytorch, sage, sage3
from .base import Backend, Request

BACKENDS: tuple[Backend, ...] = (
    pytorch.BACKEND,
    cudnn.BACKEND,
    flash.BACKEND,
    sage.BACKEND,
    sage3.BACKEND,
    comfy_kitchen.BACKEND,
)

__all__ = ["BACKENDS", "Backend", "Request"]
