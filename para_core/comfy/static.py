"""A model whose weights stay on the GPU, for one that ComfyUI's dynamic VRAM streams.

Compiled code and CUDA graphs need weights that do not move. ComfyUI's own compiling node takes such a copy of a model from the
model's loader; so does a run that compiles, where the copy fits the card, and the host's memory beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

CARD = 0.7
"""Largest share of the card's memory that weights may fill: the rest is for computing."""
HOST = 1.25
"""Free host memory that a copy needs, as a multiple of its weights: they pass through it, and wait there for other models' turns."""
_COPY, _BASE = "_paradit_static", "_paradit_static_base"


def possible(patcher: ModelPatcher) -> bool:
    """Whether a streamed model can be had with weights that stay: its loader left a record, and memory is plenty."""
    if not patcher.is_dynamic() or patcher.cached_patcher_init is None:
        return False
    if not small(patcher):
        return False
    if _first(patcher).non_dynamic_delegate_model is not None:
        return True
    return HOST * patcher.model_size() < comfy.model_management.get_free_memory(torch.device("cpu"))


def small(patcher: ModelPatcher) -> bool:
    """Whether the weights leave room on the card to compute in."""
    return patcher.model_size() <= CARD * comfy.model_management.get_total_memory(patcher.load_device)


def copy(patcher: ModelPatcher, say: Callable[[str], None]) -> ModelPatcher:
    """The same model and patches with weights that stay; ``patcher`` itself, with a sentence, where its file cannot be read again.

    Read once for all models that come from one loader, and kept as long as ComfyUI keeps what the loader gave.
    """
    known: ModelPatcher | None = vars(patcher).get(_COPY)
    if known is not None and known.patches_uuid == patcher.patches_uuid:
        return known
    first = _first(patcher)
    try:
        made = patcher.clone(disable_dynamic=True, model_override=first.non_dynamic_delegate_model)
    except (OSError, RuntimeError) as error:
        say(f"Weights stay where dynamic VRAM has them: the model's file could not be read again ({error}).")
        return patcher
    convert(made.model)  # also one that ComfyUI has made for its own use
    first.non_dynamic_delegate_model = made.get_clone_model_override()
    # ComfyUI unloads a model whose patcher has gone through that one's parent. It must not be ``patcher``, which goes with its copy,
    # but last as long as the copied model.
    base: ModelPatcher | None = vars(first).get(_BASE)
    if base is None or base.model is not made.model:
        base = ModelPatcher(made.model, load_device=made.load_device, offload_device=made.offload_device)
        base.backup, base.backup_buffers, base.object_patches_backup, base.pinned = first.non_dynamic_delegate_model[1]
        setattr(first, _BASE, base)
    made.parent = base
    setattr(patcher, _COPY, made)
    return made


def convert(model: torch.nn.Module) -> None:
    """Give weights the type that the model computes with: while dynamic VRAM is on, ComfyUI's layers keep that of their file."""
    for module in model.modules():
        for name in ("weight", "bias"):
            dtype, kept = getattr(module, f"{name}_comfy_model_dtype", None), getattr(module, name, None)
            if dtype is None or not isinstance(kept, torch.nn.Parameter) or type(kept.data) is not torch.Tensor:
                continue  # quantised ones stay as they are
            if kept.is_floating_point() and kept.dtype != dtype:
                setattr(module, name, torch.nn.Parameter(kept.data.to(dtype), requires_grad=False))


def _first(patcher: ModelPatcher) -> ModelPatcher:
    """What the loader gave: the patcher that this one and its relatives were cloned from."""
    while patcher.parent is not None and patcher.parent.is_dynamic():
        patcher = patcher.parent
    return patcher
