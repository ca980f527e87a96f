"""Replacing a method on one instance, and putting back what was there."""

from __future__ import annotations

from collections.abc import Callable

import torch


def replace(module: torch.nn.Module, name: str, function: Callable) -> Callable[[], None]:
    """Have ``module.name`` be ``function``; the returned call undoes it (latest replacement first)."""
    before = module.__dict__.get(name)
    setattr(module, name, function)

    def undo() -> None:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)

    return undo
