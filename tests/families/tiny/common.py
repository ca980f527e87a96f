"""What the builders of tiny models have in common. Call nothing here before the `comfy` fixture has run."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

Tiny = tuple[torch.nn.Module, dict[str, Any]]
HEADS, WIDTH = 6, 96  # heads of 16


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def times(batch: int, scale: float = 1.0) -> torch.Tensor:
    return torch.linspace(0.7, 0.3, batch) * scale if batch > 1 else torch.tensor([0.7 * scale])


def given(*shape: int, scale: float = 1.0, text: int = 11, **extra: Any) -> dict[str, Any]:
    """A call: a latent of ``shape``, a time for each image, and ``text`` tokens of text, with or instead of them ``extra``."""
    return dict(x=noise(*shape), timestep=times(shape[0], scale), context=noise(shape[0], text, 40, seed=2)) | extra


def mask(batch: int, length: int) -> torch.Tensor:
    """The first tokens of a text, fewer of the first image's."""
    return (torch.arange(length)[None] < torch.tensor([length - 3, length])[:batch, None]).long()


def settings() -> dict[str, Any]:
    import comfy.ops

    return {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}


def seeded(model: torch.nn.Module) -> torch.nn.Module:
    """Weights of a size that keeps activations of order one. Tables that the constructor computes stay as they are."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dtype.is_floating_point and tensor.numel() and name.split(".")[-1] not in ("pos_embedding", "filter", "kernel"):
                std = 0.15 if tensor.ndim < 2 else min(0.15, tensor.shape[-1] ** -0.5)
                mean = 1.0 if tensor.ndim == 1 and name.endswith(("weight", "scale")) else 0.0
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)
    return model.eval().requires_grad_(False)


def built(kind: type, **config: Any) -> torch.nn.Module:
    """A model that remembers how it was built, for what builds it again."""
    model = kind(**config, **settings())
    model.tiny_config = config
    return model


def residuals(kinds: dict[str, list[bool]], rows: int, width: int = WIDTH, batch: int = 2) -> dict[str, list]:
    """What ControlNets hand over: residuals for some blocks."""
    return {
        kind: [noise(batch, rows, width, seed=5 + index) if given else None for index, given in enumerate(blocks)]
        for kind, blocks in kinds.items()
    }


def fields(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if name in known}
