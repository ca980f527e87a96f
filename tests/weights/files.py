"""Files for stock loaders: tiny FLUX models in every storage ComfyUI reads, and an adapter file of every kind it knows.

Call nothing here before the `comfy` fixture has run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from env import models
from torch import Tensor

HIDDEN = 2 * models.HEAD_DIM
QKV = "double_blocks.0.img_attn.qkv"
LINEAR1 = "single_blocks.1.linear1"
LAYERS = {QKV: (3 * HIDDEN, HIDDEN), LINEAR1: (7 * HIDDEN, HIDDEN)}  # where adapters sit: [out, in]


def tiny(seed: int = 31) -> dict[str, Tensor]:
    return models.flux(seed=seed, heads=2, double_blocks=1, single_blocks=2)


def values(*shape: int, seed: int, std: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


# -- adapters -----------------------------------------------------------------------------------------------------------


def lora(name: str, out: int, into: int, seed: int = 1) -> dict[str, Tensor]:
    up, down = values(out, 4, seed=seed, std=0.2), values(4, into, seed=seed + 1, std=into**-0.5)
    return {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(4.0)}


def loha(name: str, out: int, into: int) -> dict[str, Tensor]:
    sizes = {"hada_w1_a": (out, 4), "hada_w1_b": (4, into), "hada_w2_a": (out, 4), "hada_w2_b": (4, into)}
    return {f"{name}.{part}": values(*size, seed=7 + at, std=0.2) for at, (part, size) in enumerate(sizes.items())}


def lokr(name: str, out: int, into: int) -> dict[str, Tensor]:
    return {f"{name}.lokr_w1": values(4, 8, seed=21, std=0.2), f"{name}.lokr_w2": values(out // 4, into // 8, seed=22, std=0.1)}


def dora(name: str, out: int, into: int) -> dict[str, Tensor]:
    return lora(name, out, into) | {f"{name}.dora_scale": 1 + values(out, 1, seed=23, std=0.1).abs()}


def oft(name: str, out: int, into: int) -> dict[str, Tensor]:
    return {f"{name}.oft_blocks": values(4, out // 4, out // 4, seed=24, std=0.02)}


def boft(name: str, out: int, into: int) -> dict[str, Tensor]:
    return {f"{name}.oft_blocks": values(2, out // 8, 8, 8, seed=25, std=0.05), f"{name}.alpha": torch.tensor(0.5)}


def glora(name: str, out: int, into: int) -> dict[str, Tensor]:
    sizes = {"a1": (4, into), "a2": (into, 4), "b1": (4, into), "b2": (out, 4)}
    return {f"{name}.{part}.weight": values(*size, seed=26 + at, std=0.1) for at, (part, size) in enumerate(sizes.items())}


def difference(name: str, out: int, into: int) -> dict[str, Tensor]:
    return {f"{name}.diff": values(out, into, seed=31, std=0.02), f"{name}.diff_b": values(out, seed=32, std=0.1)}


def whole(name: str, out: int, into: int) -> dict[str, Tensor]:
    return {f"{name}.set_weight": values(out, into, seed=33, std=into**-0.5)}


ADAPTERS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "lora": lora,
    "loha": loha,
    "lokr": lokr,
    "dora": dora,
    "oft": oft,
    "boft": boft,
    "glora": glora,
    "diff": difference,
    "set": whole,
}


def adapter(kind: str, **options: int) -> dict[str, Tensor]:
    file: dict[str, Tensor] = {}
    for layer, shape in LAYERS.items():
        file |= ADAPTERS[kind](f"diffusion_model.{layer}", *shape, **options)
    return file


def control_lora() -> dict[str, Tensor]:
    """Makes the image embedding twice as wide, as FLUX's control LoRAs do."""
    name, shape = "diffusion_model.img_in", (HIDDEN, 2 * models.PATCH)
    return lora(name, *shape) | {f"{name}.reshape_weight": torch.tensor(shape)}


# -- models -------------------------------------------------------------------------------------------------------------

QUANTISED = {  # format: layout, and its options
    "float8_e4m3fn": ("TensorCoreFP8E4M3Layout", {"scale": "recalculate"}, {}),
    "float8_e5m2": ("TensorCoreFP8E5M2Layout", {"scale": "recalculate"}, {}),
    "nvfp4": ("TensorCoreNVFP4Layout", {"scale": "recalculate"}, {}),
    "mxfp8": ("TensorCoreMXFP8Layout", {}, {}),
    "int8_tensorwise": ("TensorWiseINT8Layout", {"scale": "recalculate"}, {}),
    "int8_convrot": ("TensorWiseINT8Layout", {"per_channel": True, "convrot": True}, {"convrot": True, "convrot_groupsize": 256}),
    "convrot_w4a4": ("TensorCoreConvRotW4A4Layout", {}, {"convrot_groupsize": 256}),
}


def inside(name: str, tensor: Tensor) -> bool:
    """The weights that quantised files have quantised: the blocks' linear layers."""
    return name.endswith(".weight") and "blocks" in name and tensor.ndim == 2


def quantised(kind: str, model: dict[str, Tensor]) -> dict[str, Tensor]:
    """As ComfyUI's quantised files are: a description beside every quantised weight."""
    from comfy.quant_ops import QuantizedTensor

    layout, options, described = QUANTISED[kind]
    described = {"format": "int8_tensorwise" if kind == "int8_convrot" else kind, **described}
    file: dict[str, Tensor] = {}
    for name, tensor in model.items():
        if inside(name, tensor):
            file |= {key: part.contiguous() for key, part in QuantizedTensor.from_float(tensor, layout, **options).state_dict(name).items()}
            file[f"{name.removesuffix('.weight')}.comfy_quant"] = torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)
        else:
            file[name] = tensor
    return file


def scaled_fp8(model: dict[str, Tensor]) -> dict[str, Tensor]:
    """The older form: fp8 weights with a scale each, and one mark for the file."""
    file: dict[str, Tensor] = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in model.items():
        if inside(name, tensor):
            scale = tensor.abs().max() / torch.finfo(torch.float8_e4m3fn).max
            file[name] = (tensor / scale).to(torch.float8_e4m3fn)
            file[f"{name.removesuffix('.weight')}.scale_weight"] = scale
        else:
            file[name] = tensor
    return file


class Folder:
    """A folder of model files that stock loaders look into."""

    def __init__(self, path: Path):
        import folder_paths

        self.path = path
        for kind in ("diffusion_models", "checkpoints", "loras"):
            (path / kind).mkdir()
            folder_paths.add_model_folder_path(kind, str(path / kind))

    def file(self, kind: str, name: str, make: Callable[[], dict[str, Tensor]]) -> str:
        """The name of a file of ``kind`` with what ``make`` returns, written at first use."""
        from safetensors.torch import save_file

        where = self.path / kind / f"{name}.safetensors"
        if not where.exists():
            save_file({key: tensor.contiguous() for key, tensor in make().items()}, where)
        return where.name
