"""Weights that ComfyUI patches each time it fetches them to a GPU (dynamic VRAM): what is sent equals what it leaves on the card.

There is no GPU here, so the fetch itself is taken apart: the test lays a layer's bytes where ComfyUI would have copied them, and
ComfyUI's own code does the rest.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import files
from .cases import BF16, FP8, adapted, merged, quantised, unet
from .files import Folder

pytestmark = pytest.mark.usefixtures("comfy")

MADE = {
    "fp32": adapted("lora"),
    "bf16": adapted("lora", BF16),
    "fp8": adapted("lora", FP8),
    "dora": adapted("dora", BF16),
    "merge": merged("ModelMergeSimple", lambda folder: unet(folder, name="flux_other", make=lambda: files.tiny(32)), ratio=0.3),
    "float8_e4m3fn": adapted("lora", lambda folder: quantised(folder, "float8_e4m3fn")),
    "nvfp4": adapted("lora", lambda folder: quantised(folder, "nvfp4")),
    "int8_tensorwise": adapted("lora", lambda folder: quantised(folder, "int8_tensorwise")),
}


def dynamic(model: Any, layer: str) -> Any:
    """Prepare a layer as ``ModelPatcherDynamic.load`` does."""
    from comfy.model_patcher import LowVramPatch

    module = model.model.diffusion_model.get_submodule(layer)
    module._v, module.seed_key, module._v_signature = object(), f"diffusion_model.{layer}", None
    module.weight_lowvram_function = LowVramPatch(f"diffusion_model.{layer}.weight", model.patches)
    module.bias_lowvram_function, module.weight_function, module.bias_function = None, [], []
    return module


def on_the_card(module: Any, compute: torch.dtype) -> Any:
    """The weight that stays there after the layer's first use."""
    import comfy.memory_management as memory
    import comfy.model_management
    import comfy.ops

    tensors = [module.weight, module.bias]
    gathered = torch.zeros(memory.vram_aligned_size(tensors), dtype=torch.uint8)
    comfy.model_management.cast_to_gathered(tensors, gathered)
    module._prefetch = {
        "signature": 1,
        "resident": False,
        "xfer_dest": gathered,
        "cast_dest": None,
        "cast_geometry": memory.tensors_to_geometries(tensors),
        "needs_cast": False,
    }
    comfy.ops.resolve_cast_module_with_vbar(module, compute, torch.device("cpu"), compute, compute, False)
    return module._v_weight


@pytest.mark.parametrize("name", MADE)
def test_sent_layers_have_the_bits_that_stay_on_the_card(folder: Folder, name: str) -> None:
    from comfy.quant_ops import QuantizedTensor

    from para_core.comfy import model as models
    from para_core.group.codec import as_bytes

    with torch.inference_mode():
        model = MADE[name](folder)
        module = dynamic(model, files.QKV)
        raw = as_bytes(model.model.diffusion_model.state_dict()[f"{files.QKV}.weight"]).clone()
        expected = on_the_card(module, model.model.get_dtype_inference())
        (unit,) = models.units(model, [files.QKV])
        sent = dict(zip([row[0].rpartition(".")[2] for row in unit.rows], unit.read(), strict=True))
        wanted = expected.state_dict("weight") if isinstance(expected, QuantizedTensor) else {"weight": expected}
        for part, tensor in wanted.items():
            assert sent[part].dtype == tensor.dtype and torch.equal(as_bytes(sent[part]), as_bytes(tensor)), part
        assert not torch.equal(as_bytes(sent["weight"]), raw), "the patch changed it"
        for row, tensor in zip(unit.rows, unit.read(), strict=True):
            assert row[1:] == [list(tensor.shape), tensor.dtype]


@pytest.mark.parametrize("there", [True, False])
def test_a_sidecar_keeps_the_library_of_dynamic_vram_as_quiet_as_comfyui_does(comfy, there, monkeypatch):
    """Left alone it logs every allocation."""
    import comfy_aimdo.control

    from para_core.comfy import flags

    asked: list[str] = []
    monkeypatch.setattr(comfy_aimdo.control, "init_devices", lambda _devices: asked.append("devices") or there)
    monkeypatch.setattr(comfy_aimdo.control, "set_log_info", lambda: asked.append("quiet"))
    assert flags.dynamic_vram(0) is there and asked == ["devices", *(["quiet"] if there else [])]
