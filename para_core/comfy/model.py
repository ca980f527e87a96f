"""A model as data: what a sidecar needs to hold the same diffusion model, with the weights that rank 0 computes with.

It travels as its class name, its configuration and its tensors. Patches (LoRA and the like) do not travel: ComfyUI applies
them on rank 0, with whatever code they carry, and the layers they change are sent as they come out. So every rank has the same
bits, and no rank keeps the unpatched weights beside the patched ones.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import comfy.float
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch
from comfy.quant_ops import QuantizedTensor

from ..group.member import Held
from ..group.weights import Unit
from . import objects

PREFIX = "diffusion_model."
QUANTISED = "comfy_quant"  # the entry of a layer's state that says how it is quantised


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
    if code := objects.foreign(model):
        raise Unshareable(f"{code} {objects.ELSEWHERE}")
    return {
        "module": module,
        "class": type(model).__qualname__,
        "config": type(config).__name__,
        "unet_config": dict(config.unet_config),
        "manual_cast_dtype": config.manual_cast_dtype,
        "quant_config": config.quant_config,
        "optimizations": dict(config.optimizations),
    }


def options(patcher: comfy.model_patcher.ModelPatcher) -> dict[str, Any]:
    """How the weights are used, beside what they are: plain data for ``ready``."""
    return {"force_cast": bool(patcher.force_cast_weights)}


def held(patcher: comfy.model_patcher.ModelPatcher) -> Held:
    """What a sidecar should hold. ComfyUI gives a patcher another uuid whenever its patches or its casts change."""
    patched = frozenset(_layer(key.removeprefix(PREFIX)) for key in patcher.patches if key.startswith(PREFIX))
    plain = not patched and not any(options(patcher).values())
    return Held("" if plain else patcher.patches_uuid.hex, patched)


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def units(patcher: comfy.model_patcher.ModelPatcher, layers: Collection[str] | None = None) -> list[Unit]:
    """The tensors of the diffusion model that ``patcher`` has loaded, patches applied, non-persistent buffers included.

    layers: only these modules (by name; None: all). Raises Unshareable for tensors of a kind that ComfyUI does not have.
    """
    model = patcher.model.diffusion_model
    found = {**dict(model.named_buffers()), **model.state_dict()}
    by_layer: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in found.items():
        if layers is None or _layer(name) in layers:
            if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
                kind = type(tensor)
                raise Unshareable(f"{name} is a {kind.__module__}.{kind.__qualname__}, which only the model's own loader understands")
            by_layer.setdefault(_layer(name), {})[name.rpartition(".")[2]] = tensor
    result = []
    for layer, tensors in by_layer.items():
        module = model.get_submodule(layer)
        rows = [[f"{layer}.{name}".lstrip("."), list(tensor.shape), _dtype(module, name, tensors)] for name, tensor in tensors.items()]
        result.append(Unit(rows, partial(_read, patcher, layer, tensors)))
    return result


def _dtype(module: torch.nn.Module, name: str, tensors: Mapping[str, torch.Tensor]) -> torch.dtype:
    """The dtype a tensor has when it is used; weights that stay in their file may be stored in another."""
    stored = tensors[name].dtype
    return stored if QUANTISED in tensors else getattr(module, f"{name}_comfy_model_dtype", None) or stored


def _read(patcher: comfy.model_patcher.ModelPatcher, layer: str, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """A layer's ``tensors`` as its forward uses them."""
    module = patcher.model.diffusion_model.get_submodule(layer)
    result = {}
    for name, tensor in tensors.items():
        dtype = _dtype(module, name, tensors)
        comfy.model_management.mark_mmap_dirty(tensor.untyped_storage())  # pages of the file that ComfyUI lets go afterwards
        result[name] = torch.zeros(tensor.shape, dtype=dtype) if tensor.is_meta else tensor.to(dtype)
    for name in ("weight", "bias"):
        patch = _patch(module, name)
        if patch is not None:
            result.update(_patched(patcher, module, name, patch))
    return list(result.values())


def _patch(module: torch.nn.Module, name: str) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The patch that ComfyUI applies whenever it fetches this weight to the GPU, instead of once in place."""
    if hasattr(module, "_v"):  # dynamic VRAM
        return getattr(module, f"{name}_lowvram_function", None)
    patches = [function for function in getattr(module, f"{name}_function", ()) if getattr(function, "is_lowvram_patch", False)]
    return patches[0] if patches else None


@torch.no_grad()
def _patched(
    patcher: comfy.model_patcher.ModelPatcher, module: torch.nn.Module, name: str, patch: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What such a patch makes of a weight, bit by bit: patched in the model's compute dtype, rounded with the layer's seed."""
    weight = getattr(module, name).to(patcher.load_device)
    seed = comfy.utils.string_to_seed(getattr(module, "seed_key", ""))
    compute = patcher.model.get_dtype_inference()
    if isinstance(weight, QuantizedTensor):
        changed = patch(weight.to(dtype=compute).dequantize())
        return weight.requantize_from_float(changed, scale="recalculate", stochastic_rounding=seed).state_dict(name)
    dtype = getattr(module, f"{name}_comfy_model_dtype", None) or weight.dtype
    changed = patch(weight.to(dtype).to(compute, copy=True))
    return {name: comfy.float.stochastic_rounding(changed, dtype, seed=seed)}


def build(data: Mapping[str, Any], device: torch.device) -> comfy.model_patcher.ModelPatcher:
    """The sidecar's ModelPatcher on ``device``: stock classes, without weights.

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
    # quantised layers rebuild themselves on the device they were made for; they hold nothing until then
    model = comfy.model_base.BaseModel(config, device=device if config.quant_config else torch.device("meta"), unet_model=model_class)
    model.device = device
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def fill(patcher: comfy.model_patcher.ModelPatcher, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give layers of a sidecar's model their ``tensors``, all of a layer's at once.

    What is there already is overwritten in place, so that a model whose patches change needs no memory for it.
    """
    by_layer: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        by_layer.setdefault(_layer(name), {})[name.rpartition(".")[2]] = tensor
    for layer, own in by_layer.items():
        module = patcher.model.diffusion_model.get_submodule(layer)
        if QUANTISED in own:
            # copies, because a view would keep its whole bucket; the description is read as text
            own = {name: tensor.cpu() if name == QUANTISED else tensor.clone() for name, tensor in own.items()}
            module.load_state_dict(own, strict=False, assign=True)
        else:
            for name, tensor in own.items():
                _put(module, name, tensor)


def _put(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    there = getattr(module, name, None)
    if isinstance(there, torch.Tensor) and not there.is_meta and (there.shape, there.dtype) == (tensor.shape, tensor.dtype):
        there.data.copy_(tensor)
    else:
        setattr(module, name, tensor if name in module._buffers else torch.nn.Parameter(tensor, requires_grad=False))


def ready(patcher: comfy.model_patcher.ModelPatcher, how: Mapping[str, Any]) -> None:
    """Load a sidecar's model, all of whose weights have arrived, with the ``options`` of rank 0's. Raises ValueError if some have not."""
    model = patcher.model.diffusion_model
    empty = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if empty:
        raise ValueError(f"no weights arrived for {', '.join(empty[:5])}")
    patcher.force_cast_weights = how["force_cast"]
    patcher.unpatch_model(patcher.load_device)
    patcher.patch_model(patcher.load_device)
