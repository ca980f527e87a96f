"""Compiled blocks and CUDA graphs in a run: which weights they need, and what stands against them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from ..attention.choice import Chooser
from ..plans import PlanError, plan_for
from ..settings import Compile
from . import calls, objects, static


def chosen(patcher: ModelPatcher) -> Compile:
    """Both where weights stay on an NVIDIA GPU, or are likely to, and torch's compiler has what it needs there."""
    if patcher.load_device.type != "cuda" or torch.version.hip or find_spec("triton") is None:
        return Compile("off")
    if patcher.is_dynamic() and (not static.possible(patcher) or objects.code(patcher)):
        return Compile("off")
    if patcher.model.model_lowvram and not static.small(patcher):  # of the last prompt: what is small may be loaded whole this time
        return Compile("off")
    return Compile("compile+graph")


def settled(setting: Compile, patcher: ModelPatcher, options: dict[str, Any]) -> bool:
    """Whether a run with these transformer options can do better with weights that stay where they are, and can have them.

    Not where nodes have put code into the model, which may be bound to layers of the one that is streamed.
    """
    if not static.possible(patcher) or calls.first_patch(options) or objects.code(patcher):
        return False
    plan = plan_for(patcher.model.diffusion_model)
    if plan is None:
        return False
    try:
        blocks = setting.blocks and bool(plan.stacks) and not objects.block_method(patcher, plan)
    except PlanError:
        return False
    return blocks or (setting.graph and torch.cuda.get_allocator_backend() != "cudaMallocAsync")


def against_graphs(patcher: ModelPatcher, chooser: Chooser, code: str = "") -> str:
    """Why forwards are not captured as CUDA graphs, in a sentence; "" if they may be. ``code``: what other nodes put into the model.

    Under cudaMallocAsync torch (2.11) ends the process when it frees what was allocated in a capture that failed, was
    cancelled or lost a rank; and compiled blocks cannot be captured under it at all.
    """
    if patcher.load_device.type != "cuda" or torch.version.hip:
        own = "an AMD GPU" if patcher.load_device.type == "cuda" else patcher.load_device
        return f"No CUDA graphs: they need an NVIDIA GPU, and this model runs on {own}; choose the mode compile or off."
    asynchronous = torch.cuda.get_allocator_backend() == "cudaMallocAsync"
    if patcher.is_dynamic() and not (asynchronous and static.possible(patcher)):
        flags = "--disable-dynamic-vram --disable-cuda-malloc" if asynchronous else "--disable-dynamic-vram"
        return f"No CUDA graphs: weights move while the model runs (ComfyUI with {flags} keeps them on the GPU where they fit)."
    if patcher.model.model_lowvram:
        return "No CUDA graphs: some weights wait in host memory, because the GPU cannot hold all of them."
    if asynchronous:
        return "No CUDA graphs: with the allocator cudaMallocAsync one that fails ends ComfyUI (--disable-cuda-malloc: another allocator)."
    if code:
        return f"No CUDA graphs: {code} may decide anew at every step, and a graph would repeat one of them."
    stock = chooser.setting is None and comfy.model_management.sage_attention_enabled()
    if stock or chooser.previous is not None:  # nobody knows on which stream it launches; SageAttention 2 on another one
        whose = "--use-sage-attention" if stock else "another node's attention override"
        return f"No CUDA graphs: {whose} may launch kernels where a graph does not see them."
    return ""
