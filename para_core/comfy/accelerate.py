"""What ``ParaAccelerate`` sets for a run, by machine, model and number of steps. A node that sets one of these itself wins."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ..cache.presets import FEW_STEPS, PRESETS
from ..settings import Accelerate, Attention, Cache, Compile, Parallel
from . import static


def fill(settings: dict[str, Any], patcher: ModelPatcher, *, steps: int, say: Callable[[str], None]) -> dict[str, Any]:
    """``settings`` by kind, with what the Accelerate among them chooses for those that no node has set."""
    wish: Accelerate | None = settings.get("Accelerate")
    if wish is None:
        return settings
    chosen: dict[str, Any] = {"Parallel": Parallel(wish.gpus, careful=True), "Attention": Attention(wish.attention)}
    if wish.compile == "auto":
        chosen["Compile"] = compiling(patcher)
    if "Cache" not in settings and (cache := caching(wish.cache, steps, say)) is not None:
        chosen["Cache"] = cache
    return {**chosen, **settings}


def caching(preset: str, steps: int, say: Callable[[str], None]) -> Cache | None:
    """The cache of a preset, None for "off" and for a run of few steps, in which each one matters."""
    if preset == "off":
        return None
    if steps <= FEW_STEPS:
        say(f"No step is cached: a run of {steps} steps needs each of them.")
        return None
    return PRESETS[preset]


def compiling(patcher: ModelPatcher) -> Compile:
    """Compiled blocks and graphs where weights stay on an NVIDIA GPU and torch's compiler has what it needs there."""
    if patcher.load_device.type != "cuda" or torch.version.hip or find_spec("triton") is None:
        return Compile("off")
    if patcher.model.model_lowvram or (patcher.is_dynamic() and not static.possible(patcher)):
        return Compile("off")
    return Compile("compile+graph")


def against_graphs(patcher: ModelPatcher) -> str:
    """Why forwards of a model on a CUDA device are not captured as CUDA graphs, in a sentence; "" if they may be.

    Under cudaMallocAsync torch (2.11) ends the process when it frees what was allocated in a capture that failed, was
    cancelled or lost a rank; and compiled blocks cannot be captured under it at all.
    """
    asynchronous = torch.cuda.get_allocator_backend() == "cudaMallocAsync"
    if patcher.is_dynamic() and not (asynchronous and static.possible(patcher)):
        flags = "--disable-dynamic-vram --disable-cuda-malloc" if asynchronous else "--disable-dynamic-vram"
        return f"No CUDA graphs: weights move while the model runs (ComfyUI with {flags} keeps them on the GPU where they fit)."
    if patcher.model.model_lowvram:
        return "No CUDA graphs: some weights wait in host memory, because the GPU cannot hold all of them."
    if asynchronous:
        return "No CUDA graphs: with the allocator cudaMallocAsync one that fails ends ComfyUI (--disable-cuda-malloc: another allocator)."
    return ""
