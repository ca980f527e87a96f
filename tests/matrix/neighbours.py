"""What other packs and nodes add to a call: ControlNet residuals, patches, options, another attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from families.tiny.common import WIDTH, residuals
from families.tiny.flux import BOTH

# blocks with and without residuals, and the width of the stream, by the beginning of a case's name
CONTROL: dict[str, tuple[dict[str, list[bool]], int]] = {
    "flux": (BOTH, WIDTH),
    "chroma": (BOTH, WIDTH),
    "hunyuan": ({"input": [True] * 2, "output": [True] * 3}, WIDTH),
    "qwen": ({"input": [True, False, True]}, WIDTH),
    "sd3": ({"output": [True, True]}, 192),
}


def control(case: str, rows: int, batch: int) -> dict[str, list]:
    kinds, width = next(found for start, found in CONTROL.items() if case.startswith(start))
    return residuals(kinds, rows, width, batch)


def attn1(*args, **_kwargs) -> Any:
    """Per token. Wan hands over the output, others q, k and v."""
    if len(args) == 1:
        return args[0]["x"] * 1.1
    q, _, v = args
    return {"q": q * 1.1, "v": v * 0.9}


def attn1_output(attention: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Per token, another factor for the image's tokens."""
    start, _ = options["img_slice"]
    return torch.cat((attention[:, :start], attention[:, start:] * 1.2), dim=1)


def post_input(given: dict[str, Any]) -> dict[str, Any]:
    """On whole tokens before the blocks: each place is changed in another way."""
    image = given["img"]
    return {**given, "img": image + 0.1 * torch.arange(image.numel() // image.shape[0]).sin().view(image.shape[1:])}


def skip(given: dict[str, Any], _more: dict[str, Any]) -> dict[str, Any]:
    """In place of a block: hand its tokens on."""
    return {name: given[name] for name in ("img", "txt", "x") if name in given}


def foreign(func: Callable[..., torch.Tensor], *args, **kwargs) -> torch.Tensor:
    """An attention override of another pack."""
    return func(*args, **kwargs).tanh()


@dataclass(frozen=True)
class Neighbour:
    options: dict[str, Any] = field(default_factory=dict)
    control: bool = False
    previous: Callable[..., torch.Tensor] | None = None


NEIGHBOURS: dict[str, Neighbour] = {
    "none": Neighbour(),
    "control": Neighbour(control=True),
    "rope options": Neighbour({"rope_options": {"scale_x": 1.3, "shift_y": 0.7}}),
    "attn1 patch": Neighbour({"patches": {"attn1_patch": [attn1]}}),
    "attn1 output patch": Neighbour({"patches": {"attn1_output_patch": [attn1_output]}}),
    "post input patch": Neighbour({"patches": {"post_input": [post_input]}}),
    "skipped block": Neighbour({"patches_replace": {"dit": {("double_block", 1): skip}}}),
    "another attention": Neighbour(previous=foreign),
}
