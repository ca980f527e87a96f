"""A model as data: what a sidecar needs to build the same ModelPatcher, with the same weights and patches.

The diffusion model travels as its class name, its configuration and its raw, *unpatched* tensors; patches travel as
adapters and strengths, and are applied there by ComfyUI's own code, so that every rank rounds alike.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import comfy.weight_adapter
import torch

PREFIX = "diffusion_model."
ADAPTERS = {adapter.__name__: adapter for adapter in comfy.weight_adapter.adapters}


class Unshareable(RuntimeError):
    """This model cannot be rebuilt in another process; the message says why."""


def recipe(patcher: comfy.model_patcher.ModelPatcher) -> dict[str, Any]:
    """How to build the diffusion model of ``patcher`` without its weights: plain data.

    Raises Unshareable for models that carry code of other packs (custom operations, replaced objects, injections).
    """
    config, model = patcher.model.model_config, patcher.model.diffusion_model
    module = type(model).__module__
    if not module.startswith("comfy.ldm."):
        raise Unshareable(f"{module}.{type(model).__qualname__} is not one of ComfyUI's own models")
    if not isinstance(config, comfy.supported_models.supported_models_base.BASE):
        raise Unshareable(f"its configuration {type(config).__name__} is not one of ComfyUI's own")
    if config.custom_operations is not None:
        raise Unshareable("its loader brings its own layer operations, which other processes do not have")
    replaced = [name for name in patcher.object_patches if name.startswith(PREFIX)]
    if replaced:
        raise Unshareable(f"a node replaced {', '.join(sorted(replaced))} inside the model")
    if patcher.injections:
        raise Unshareable(f"a node injects code into the model ({', '.join(sorted(map(str, patcher.injections)))})")
    if patcher.weight_wrapper_patches:
        raise Unshareable("a node wraps the model's weights")
    return {
        "module": module,
        "class": type(model).__qualname__,
        "config": type(config).__name__,
        "unet_config": dict(config.unet_config),
        "manual_cast_dtype": config.manual_cast_dtype,
        "quant_config": config.quant_config,
        "optimizations": dict(config.optimizations),
    }


def tensors(patcher: comfy.model_patcher.ModelPatcher) -> dict[str, torch.Tensor]:
    """The diffusion model's tensors as the file had them, by name, non-persistent buffers included.

    Loading applies patches in place and keeps the originals in ``backup``; those are the ones that count.
    """
    model = patcher.model.diffusion_model
    found = dict(model.state_dict())
    found.update((name, buffer) for name, buffer in model.named_buffers() if name not in found)
    originals = {key: saved.weight for key, saved in patcher.backup.items()}
    originals.update(patcher.backup_buffers)
    for key, original in originals.items():
        name = key.removeprefix(PREFIX)
        if key.startswith(PREFIX) and name in found:
            if type(original) not in (torch.Tensor, torch.nn.Parameter):
                raise Unshareable(f"{name} is stored as {type(original).__name__} and was patched in place")
            found[name] = original
    return {name: tensor.detach() for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


def patches(patcher: comfy.model_patcher.ModelPatcher) -> list:
    """Weight patches of the diffusion model as plain data. Raises Unshareable for patches that carry code."""
    keys = sorted(key for key in patcher.patches if key.startswith(PREFIX))
    return [[key, [_patch_data(key, *patch) for patch in patcher.patches[key]]] for key in keys]


def _patch_data(key: str, strength: float, value, strength_model: float, offset, function) -> list:
    if function is not None:
        raise Unshareable(f"the patch of {key} comes with a function of its own")
    if isinstance(value, comfy.weight_adapter.WeightAdapterBase):
        if ADAPTERS.get(type(value).__name__) is not type(value):
            raise Unshareable(f"the patch of {key} is a {type(value).__name__}, which ComfyUI does not have")
        value = {"adapter": type(value).__name__, "loaded_keys": sorted(value.loaded_keys), "weights": value.weights}
    return [strength, value, strength_model, offset]


def build(data: Mapping[str, Any], weights: dict[str, torch.Tensor], device: torch.device) -> comfy.model_patcher.ModelPatcher:
    """The sidecar's ModelPatcher: stock classes, ``weights`` taken as they are (no copy), on ``device``.

    Raises ValueError for a class outside ComfyUI's own models: names come from another process.
    """
    if not data["module"].startswith("comfy.ldm."):
        raise ValueError(f"{data['module']} is not a model of ComfyUI")
    model_class = getattr(importlib.import_module(data["module"]), data["class"])
    config_class = getattr(comfy.supported_models, data["config"], None)
    if not (isinstance(model_class, type) and issubclass(model_class, torch.nn.Module) and isinstance(config_class, type)):
        raise ValueError(f"{data['module']}.{data['class']} with {data['config']} is not a model of ComfyUI")
    config = config_class(data["unet_config"])
    config.unet_config = dict(data["unet_config"])
    config.manual_cast_dtype = data["manual_cast_dtype"]
    config.quant_config = data["quant_config"]
    config.optimizations = dict(data["optimizations"])
    # quantised layers rebuild themselves on the device they were made for, so those are not built on "meta"
    model = comfy.model_base.BaseModel(config, device=device if config.quant_config else torch.device("meta"), unet_model=model_class)
    diffusion_model = model.diffusion_model
    diffusion_model.load_state_dict(weights, strict=False, assign=True)
    for name in [name for name, _ in diffusion_model.named_buffers()]:
        if name in weights:
            comfy.utils.set_attr_buffer(diffusion_model, name, weights[name])
    empty = [name for name, tensor in [*diffusion_model.named_parameters(), *diffusion_model.named_buffers()] if tensor.is_meta]
    if empty:
        raise ValueError(f"no weights arrived for {', '.join(empty[:5])}")
    model.device = device
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


def apply(patcher: comfy.model_patcher.ModelPatcher, data: list) -> None:
    """Replace the patches of a sidecar's model and bake them into its weights with ComfyUI's own arithmetic."""
    patcher.unpatch_model(patcher.load_device)
    patcher.patches = {key: [_patch(*patch) for patch in stack] for key, stack in data}
    patcher.patch_model(patcher.load_device)


def _patch(strength: float, value, strength_model: float, offset) -> tuple:
    if isinstance(value, dict) and "adapter" in value:
        value = ADAPTERS[value["adapter"]](set(value["loaded_keys"]), value["weights"])
    return strength, value, strength_model, offset, None
