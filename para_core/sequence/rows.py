"""Batch rows: which replica computes which rows of a call, and a call's arguments for some of its rows."""

from __future__ import annotations

from typing import Any

import torch


def take(value: Any, rows: int, start: int, stop: int) -> Any:
    """``value`` for batch rows ``start:stop``: tensors whose first dim is ``rows`` are narrowed, nested data is searched."""
    if isinstance(value, torch.Tensor):
        return value[start:stop] if value.ndim and value.shape[0] == rows else value
    if isinstance(value, dict):
        return {key: take(item, rows, start, stop) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(take(item, rows, start, stop) for item in value)
    return value
