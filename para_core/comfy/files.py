"""Where a card cannot hold a model: every sidecar opens the model's file itself, and offloads it as ComfyUI does.

ComfyUI's loaders leave a record of what they opened (``cached_patcher_init``), from which it makes copies for further cards
itself. With such a copy weights stay in the file until a layer needs them, and the system keeps one copy of the file in memory
for all processes. Patches must travel here, because no rank holds the patched weights.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import comfy.memory_management
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.weight_adapter
import torch

from . import flags
from .model import PREFIX, Unshareable

LOADERS = {loader.__name__: loader for loader in (comfy.sd.load_diffusion_model, comfy.sd.load_checkpoint_guess_config)}
ADAPTERS = {adapter.__name__: adapter for adapter in comfy.weight_adapter.adapters}
PLACES = ("load_device", "offload_device")  # options that are each rank's own


def origin(patcher: comfy.model_patcher.ModelPatcher) -> dict[str, Any] | None:
    """How ``patcher`` was loaded, as plain data; None if its loader left no record that another process could follow."""
    record: Any = patcher.cached_patcher_init
    loader = next((name for name, known in LOADERS.items() if record is not None and record[0] is known), None)
    if loader is None:
        return None
    arguments = [
        {name: value for name, value in argument.items() if name not in PLACES} if isinstance(argument, dict) else argument
        for argument in record[1]
    ]
    index = record[2] if len(record) > 2 else None
    return {"loader": loader, "arguments": arguments, "index": index, "dynamic": patcher.is_dynamic()}


def offloaded(patcher: comfy.model_patcher.ModelPatcher, working: float) -> bool:
    """Whether rank 0 computes without holding all weights on its card, of whose memory it needs ``working`` bytes to compute."""
    if not patcher.is_dynamic():
        return bool(patcher.model.model_lowvram)
    device = patcher.load_device
    usable = comfy.model_management.get_total_memory(device) - comfy.model_management.extra_reserved_memory()
    return patcher.model_size() + working > usable


def patches(patcher: comfy.model_patcher.ModelPatcher) -> list:
    """The patches of the diffusion model as plain data. Raises Unshareable for patches that carry code or whole models."""
    keys = sorted(key for key in patcher.patches if key.startswith(PREFIX))
    return [[key, [_data(key, *patch) for patch in patcher.patches[key]]] for key in keys]


def _data(key: str, strength: float, value: Any, strength_model: float, offset: Any, function: Any) -> list:
    what = ""
    if function is not None:
        what = "comes with a function of its own"
    elif isinstance(value, list):
        what = "holds another model's weights"
    elif isinstance(value, comfy.weight_adapter.WeightAdapterBase):
        if ADAPTERS.get(type(value).__name__) is not type(value):
            what = f"is a {type(value).__name__}, which ComfyUI does not have"
        value = {"adapter": type(value).__name__, "loaded_keys": sorted(value.loaded_keys), "weights": value.weights}
    if what:
        raise Unshareable(f"the model does not fit the GPUs whole, and the patch of {key} {what}")
    return [strength, value, strength_model, offset]


def open_file(data: Mapping[str, Any], device: torch.device) -> comfy.model_patcher.ModelPatcher:
    """A sidecar's own model from the file that rank 0's came from."""
    if data["dynamic"] and device.type == "cuda":
        _dynamic_vram(device)
    opened = LOADERS[data["loader"]](*data["arguments"])
    return opened if data["index"] is None else opened[data["index"]]


def opened(patcher: comfy.model_patcher.ModelPatcher) -> bool:
    """Whether a sidecar's model came from ``open_file``."""
    return patcher.cached_patcher_init is not None


def load(patcher: comfy.model_patcher.ModelPatcher, stacks: list, how: Mapping[str, Any]) -> None:
    """Give a sidecar's own model its patches, and have ComfyUI load as much of it as leaves ``how["working"]`` bytes free."""
    patcher.patches = {key: [_patch(*patch) for patch in stack] for key, stack in stacks}
    patcher.patches_uuid = uuid.uuid4()
    patcher.force_cast_weights = how["force_cast"]
    comfy.model_management.load_models_gpu([patcher], memory_required=how["working"])


def _patch(strength: float, value: Any, strength_model: float, offset: Any) -> tuple:
    if isinstance(value, dict) and "adapter" in value:
        value = ADAPTERS[value["adapter"]](set(value["loaded_keys"]), value["weights"])
    return strength, value, strength_model, offset, None


def _dynamic_vram(device: torch.device) -> None:
    """What ComfyUI's main program does for rank 0: weights move by the page, and stay in their file until then."""
    if not comfy.memory_management.aimdo_enabled and flags.dynamic_vram(device.index):
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True
