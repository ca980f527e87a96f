"""The axes of the matrix, and which of their values cannot meet, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from families.cases import CASES

from .covering import Value
from .masks import MASKS
from .neighbours import CONTROL, NEIGHBOURS
from .shapes import SHAPES

# degrees that are asked of a number of ranks, as a user would; what does not fit is lowered
SPLITS: dict[str, Callable[[int], dict[str, int]]] = {
    "ulysses": lambda ranks: dict(batch=1, ring=1),
    "ring": lambda ranks: dict(batch=1, ulysses=1),
    "unified": lambda ranks: dict(batch=1, ring=2),
    "batch": lambda ranks: dict(batch=ranks, ring=1, ulysses=1),
    "batch x ulysses": lambda ranks: dict(batch=2, ring=1),
    "batch x ring": lambda ranks: dict(batch=2, ulysses=1),
    "chosen": lambda ranks: {},
}
SPEEDS: dict[str, Sequence[float] | None] = {"even": None, "uneven": (3.0, 1.0, 2.2, 0.4, 1.7)}
# of the First Block Cache, one a step
CACHES: dict[str, Sequence[float] | None] = {"off": None, "never hits": (0.0, 0.0), "hits": (0.0, 1e9)}

AXES: dict[str, Sequence[str]] = {
    "case": [name for name in CASES if not name.endswith(" control")],  # ControlNets are an axis of their own
    "split": list(SPLITS),
    "ranks": ["2", "3", "4", "5", "1"],
    "borders": ["local", "whole"],
    "speeds": list(SPEEDS),
    "cache": list(CACHES),
    "shape": list(SHAPES),
    "mask": list(MASKS),
    "neighbour": list(NEIGHBOURS),
}

VIDEO = ("hunyuan", "mochi", "cogvideox", "wan", "minimax", "ltx", "cosmos")
GRID = ("cosmos", "anima")
WHOLE = ("wan s2v", "wan animate", "wan dancer", "cosmos 1")
RESIZING = {name for name, shape in SHAPES.items() if shape.grid or shape.frames}
TEXTS = {name for name, shape in SHAPES.items() if shape.text}
ONE_IMAGE = ("minimax", "flux2 reference at timestep zero", *(f"hunyuan video {kind}" for kind in ("mask", "guiding", "reference")))
GUIDES = ("ltx video keyframes", "ltx video weak guide", "ltx 2 weak guide")
OWN_MASK = ("flux mask", "hunyuan video mask", "qwen image mask", "ltx video weak guide", "ltx 2 weak guide")
# the families that read what a neighbour leaves for them
READERS: dict[str, tuple[str, ...]] = {
    "control": tuple(CONTROL),
    "rope options": ("flux", "wan", "lumina", "z-image", "kandinsky"),
    "attn1 patch": ("flux", "chroma", "hunyuan", "wan", "qwen", "cosmos predict2", "anima", "krea"),
    "attn1 output patch": ("flux", "chroma", "hunyuan", "krea"),
    "post input patch": ("flux", "qwen", "cosmos predict2", "anima", "krea"),
    "skipped block": ("flux", "chroma", "hunyuan", "mochi", "wan", "minimax", "qwen", "ltx", "sd3", "kandinsky"),
}


def of_shape(case: str, shape: str) -> str:
    if shape in ("one frame", "five frames") and not case.startswith(VIDEO):
        return "it makes images, not videos"
    if shape == "three images" and case.startswith(ONE_IMAGE):
        return "ComfyUI itself takes no more images here"
    if case == "flux mask" and shape in RESIZING | TEXTS:
        return "its mask is for tokens of this number"
    if case in GUIDES and shape in RESIZING:
        return "its guides are for latents of this size"
    if case == "wan dancer" and SHAPES[shape].grid:
        return "its audio layers take latents of 8 x 8 only"
    if case == "wan scail 2" and SHAPES[shape].frames:
        return "its masks are for this number of frames"
    return ""


def of_mask(case: str, mask: str) -> str:
    if mask == "none":
        return ""
    if case in OWN_MASK:
        return "it has a mask of its own"
    return "masks of tokens that stay a grid are not supported" if case.startswith(GRID) else ""


def of_neighbour(case: str, neighbour: str) -> str:
    if neighbour in READERS and not case.startswith(READERS[neighbour]):
        return "the family does not read it"
    if neighbour == "skipped block" and case == "hunyuan video 1.5":
        return "this tiny model has no block between its first and its last"
    if neighbour == "control" and case == "hunyuan video reference":
        return "ComfyUI itself cannot add residuals beside a reference"
    return ""


def of_borders(case: str, borders: str) -> str:
    return "its borders are whole anyway" if borders == "whole" and case.startswith(WHOLE) else ""


RULES: dict[str, Callable[[str, str], str]] = {"shape": of_shape, "mask": of_mask, "neighbour": of_neighbour, "borders": of_borders}


def excluded(one: Value, other: Value) -> str:
    """Why the two values cannot meet, "" if they can."""
    if other[0] == "case":
        one, other = other, one
    return RULES[other[0]](one[1], other[1]) if one[0] == "case" and other[0] in RULES else ""
