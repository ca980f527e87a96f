"""The local attention kernels. Adding one = one file that defines ``BACKEND``, and its line here."""

from __future__ import annotations

from . import pytorch
from .base import Backend, Request

BACKENDS: tuple[Backend, ...] = (pytorch.BACKEND,)

__all__ = ["BACKENDS", "Backend", "Request"]
