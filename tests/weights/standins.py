"""Stand-ins for what other packs bring. None of this is code of those packs; it only has their outer form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import files

if TYPE_CHECKING:
    from .files import Folder


class PackedTensor(torch.Tensor):
    """Stand-in for the tensors of GGUF loaders: a class of its own, and not the bytes of ordinary numbers."""


def own_layers(folder: Folder) -> Any:
    """Stand-in for a GGUF loader: layers that unpack their weights in each forward, and no factory on record."""
    import comfy.ops
    import comfy.sd

    class Operations(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            def forward_comfy_cast_weights(self, input):
                return torch.nn.functional.linear(input, self.weight.as_subclass(torch.Tensor), self.bias)

    model = {name: tensor.as_subclass(PackedTensor) for name, tensor in files.tiny().items()}
    patcher = comfy.sd.load_diffusion_model_state_dict(model, model_options={"custom_operations": Operations})
    assert patcher.cached_patcher_init is None
    return patcher


def own_tensors(folder: Folder) -> Any:
    """Stand-in for a loader that leaves its own tensors in stock layers."""
    import comfy.sd

    patcher = comfy.sd.load_diffusion_model_state_dict(files.tiny())
    weight = patcher.model.diffusion_model.img_in.weight
    patcher.model.diffusion_model.img_in.weight = torch.nn.Parameter(weight.detach().as_subclass(PackedTensor), requires_grad=False)
    assert patcher.cached_patcher_init is None
    return patcher


def adapter() -> Any:
    """Stand-in for an adapter class of another pack."""
    from comfy.weight_adapter.base import WeightAdapterBase

    class Tilted(WeightAdapterBase):
        name = "tilted"

        def calculate_weight(self, weight, key, strength, *_args, **_options):
            return weight + strength * 0.05 * weight.roll(1, 0)

    return Tilted()
