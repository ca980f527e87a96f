"""Other sizes of the calls in tests/families/cases.py: batch, latents, text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from families.ranks import Call, latents
from families.tiny import noise

from para_core.plans.plan import Plan, patch_sides


@dataclass(frozen=True)
class Shape:
    """What of a call changes; None leaves it. ``grid``: patches along the last two sides for a number of ranks."""

    rows: int | None = None
    grid: Callable[[int], tuple[int, int]] | None = None
    frames: int | None = None
    text: Callable[[int], int] | None = None


SHAPES: dict[str, Shape] = {
    "as built": Shape(),
    "one image": Shape(rows=1),
    "three images": Shape(rows=3),
    "one token a rank": Shape(grid=lambda ranks: (ranks, 1), frames=1, text=lambda ranks: ranks),
    "fewer tokens than ranks": Shape(grid=lambda ranks: (max(1, ranks - 1), 1), frames=1),
    "one token": Shape(grid=lambda ranks: (1, 1), frames=1),
    "one row": Shape(grid=lambda ranks: (1, 13)),
    "even": Shape(grid=lambda ranks: (10, 6), text=lambda ranks: 60),
    "one frame": Shape(frames=1),
    "five frames": Shape(frames=5),
    "two text tokens": Shape(text=lambda ranks: 2),
    "one text token": Shape(text=lambda ranks: 1),
    "long text": Shape(text=lambda ranks: 61),
}


def image_tokens(plan: Plan, model: torch.nn.Module, call: Call) -> int:
    sides = latents(call)[0].shape[2:]
    return math.prod(-(-side // patch) for side, patch in zip(sides, patch_sides(plan, model, len(sides)), strict=True))


def reshaped(plan: Plan, model: torch.nn.Module, call: Call, shape: Shape, ranks: int) -> Call:
    """The call in that shape. What has the sides of the latent follows it."""
    call = dict(call)
    if shape.text is not None:
        call = with_text(call, shape.text(ranks))
    if shape.grid is not None or shape.frames is not None:
        old = tuple(latents(call)[0].shape[2:])
        patch = patch_sides(plan, model, len(old))
        new = list(old)
        if shape.grid is not None:
            new[-2:] = [count * size for count, size in zip(shape.grid(ranks), patch[-2:], strict=True)]
        if shape.frames is not None and len(old) == 3:
            new[0] = shape.frames
        call = resized(call, old, tuple(new), patch)
    if shape.rows is not None:
        before = latents(call)[0].shape[0]
        call = {name: repeated(value, before, shape.rows, mirrored=name == "x") for name, value in call.items()}
    return call


def with_text(call: Call, length: int) -> Call:
    """The call with another text, and what says of each text token whether it counts."""
    old = call["context"]
    batch = old.shape[0]
    call = {**call, "context": noise(batch, length, old.shape[2], seed=2)}
    mask = call.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.shape == (batch, old.shape[1]):
        held = torch.tensor([max(1, length - 3), length])[:batch, None]
        call["attention_mask"] = (torch.arange(length)[None] < held).to(mask.dtype)
    if "num_tokens" in call:
        call["num_tokens"] = length
    if "minimax_payload" in call:
        tags = call["minimax_payload"]["text_token_tags"]
        call["minimax_payload"] = {**call["minimax_payload"], "text_token_tags": tags[torch.arange(length) % len(tags)]}
    return call


def resized(call: Call, old: tuple[int, ...], new: tuple[int, ...], patch: list[int]) -> Call:
    """The call with ``new`` sides instead of ``old`` wherever a tensor has them, as latent or as pixels."""

    def tokens(sides: tuple[int, ...]) -> int:
        return math.prod(-(-side // size) for side, size in zip(sides, patch, strict=True))

    def follow(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: follow(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(follow(item) for item in value)
        if not isinstance(value, torch.Tensor) or value.ndim < 4:
            return value
        for count in (len(old), 2):
            for scale in (1, 8):
                if tuple(value.shape[-count:]) == (*old[-count:-2], *(scale * side for side in old[-2:])):
                    return noise(*value.shape[:-count], *new[-count:-2], *(scale * side for side in new[-2:]), seed=11)
        return value

    def timesteps(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(timesteps(item) for item in value)
        if value.ndim == 2 and len(old) == 3:
            for rows in (lambda sides: sides[0], tokens):
                if value.shape[1] == rows(old):
                    return value[:, torch.arange(rows(new)) % rows(old)]
        return value

    call = {name: timesteps(value) if name == "timestep" else follow(value) for name, value in call.items()}
    audio = call.get("audio_embed")
    if audio is not None and audio.ndim == 5:  # by frame
        call["audio_embed"] = audio[:, torch.arange(new[0]) % audio.shape[1]]
    return call


def repeated(value: Any, before: int, rows: int, *, mirrored: bool = False) -> Any:
    """The first rows, or more than there are: then mirrored ones, so that no two are the same."""
    if isinstance(value, (list, tuple)):
        return type(value)(repeated(item, before, rows, mirrored=mirrored) for item in value)
    if not isinstance(value, torch.Tensor) or not value.ndim or value.shape[0] != before:
        return value
    more = [value[index % before][None] for index in range(rows)]
    return torch.cat([one.flip(-1) if index >= before and mirrored else one for index, one in enumerate(more)])
