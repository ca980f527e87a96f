"""What can be done to a model's weights before it is sampled: the rows of the README's table, each with its cases.

A case makes the MODEL that a user's graph would, with stock nodes wherever there are any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from . import files, standins
from .files import Folder


@dataclass(frozen=True)
class Case:
    """``tolerance``: relative, a forward. ``sentence``: words of the note where the run stays on one GPU; "" where it is shared."""

    make: Callable[[Folder], Any]
    tolerance: float = 1e-5
    sentence: str = ""


def unet(folder: Folder, weight_dtype: str = "default", name: str = "flux", make: Callable[[], dict] = files.tiny) -> Any:
    """Load Diffusion Model."""
    import nodes

    return nodes.UNETLoader().load_unet(folder.file("diffusion_models", name, make), weight_dtype)[0]


def checkpoint(folder: Folder) -> Any:
    """Load Checkpoint: the model's tensors sit beside a VAE's in the file."""
    import nodes
    from env import models

    def make() -> dict:
        return models.prefixed("model.diffusion_model.", files.tiny()) | models.prefixed("vae.", models.tiny_autoencoder(3))

    return nodes.CheckpointLoaderSimple().load_checkpoint(folder.file("checkpoints", "flux", make))[0]


def stored(folder: Folder, dtype: torch.dtype) -> Any:
    """As --fp16-unet and --bf16-unet have Load Diffusion Model do it."""
    import comfy.sd
    import folder_paths

    path = folder_paths.get_full_path_or_raise("diffusion_models", folder.file("diffusion_models", "flux", files.tiny))
    return comfy.sd.load_diffusion_model(path, model_options={"dtype": dtype})


def quantised(folder: Folder, kind: str) -> Any:
    make = files.scaled_fp8 if kind == "scaled_fp8" else partial(files.quantised, kind)
    return unet(folder, name=f"flux_{kind}", make=lambda: make(files.tiny()))


def with_adapter(folder: Folder, model: Any, kind: str = "lora", strength: float = 0.8, **options: int) -> Any:
    """Load LoRA (model only)."""
    import nodes

    make = files.control_lora if kind == "control" else partial(files.adapter, kind, **options)
    name = folder.file("loras", "_".join([kind, *map(str, options.values())]), make)
    before = {key: len(stack) for key, stack in model.patches.items()}
    model = nodes.LoraLoaderModelOnly().load_lora_model_only(model, name, strength)[0]
    assert {key: len(stack) for key, stack in model.patches.items()} != before, "the file fits the model"
    return model


def adapted(kind: str, base: Callable[[Folder], Any] = unet) -> Callable[[Folder], Any]:
    return lambda folder: with_adapter(folder, base(folder), kind)


def stack(folder: Folder) -> Any:
    model = unet(folder)
    for seed, strength in ((1, 0.7), (5, -0.4), (9, 0.2)):
        model = with_adapter(folder, model, strength=strength, seed=seed)
    return with_adapter(folder, model, "loha")


def other(folder: Folder) -> Any:
    return unet(folder, name="flux_other", make=lambda: files.tiny(32))


def merged(node: str, model2: Callable[[Folder], Any] = other, **values: Any) -> Callable[[Folder], Any]:
    def make(folder: Folder) -> Any:
        import comfy_extras.nodes_model_merging as merging
        import comfy_extras.nodes_model_merging_model_specific as specific

        return {**vars(merging), **vars(specific)}[node]().merge(unet(folder), model2(folder), **values)[0]

    return make


def function(folder: Folder) -> Any:
    """As packs do whose LoRA formats sort rows anew: ``add_patches`` with an offset and a function."""
    model = unet(folder).clone()
    key = (f"diffusion_model.{files.QKV}.weight", (0, files.HIDDEN, files.HIDDEN), lambda weight: weight.flip(0))
    assert model.add_patches({key: ("diff", (files.values(files.HIDDEN, files.HIDDEN, seed=4, std=0.02),))}, 0.9) == [key]
    return model


def foreign_adapter(folder: Folder) -> Any:
    model = unet(folder).clone()
    key = f"diffusion_model.{files.LINEAR1}.weight"
    assert model.add_patches({key: standins.adapter()}, 0.5) == [key]
    return model


def compute_dtype(folder: Folder) -> Any:
    from comfy_extras.nodes_model_advanced import ModelComputeDtype

    return ModelComputeDtype().patch(with_adapter(folder, unet(folder)), "bf16")[0]


def bypassed(folder: Folder) -> Any:
    from comfy_extras.nodes_lora_debug import LoraLoaderBypassModelOnly

    name = folder.file("loras", "lora", partial(files.adapter, "lora"))
    return LoraLoaderBypassModelOnly().load_lora_model_only(unet(folder), name, 0.8)[0]


def wrapped(folder: Folder) -> Any:
    model = unet(folder).clone()
    model.add_weight_wrapper(f"diffusion_model.{files.QKV}.weight", lambda weight: weight * 1.1)
    return model


def replaced(folder: Folder) -> Any:
    model = unet(folder).clone()
    model.add_object_patch("diffusion_model.img_in", torch.nn.Linear(64, files.HIDDEN))
    return model


COARSE = 1e-2  # int8 layers round their activations: stock, too, moves that far when its input changes in the last bit
HALF = 2e-2  # computed in bf16

SPLIT, SINGLE = "split", "one GPU"
FP8, BF16 = partial(unet, weight_dtype="fp8_e4m3fn"), partial(stored, dtype=torch.bfloat16)


@dataclass(frozen=True)
class Row:
    """A row of the table. ``cases``: by what tells them apart."""

    runs: str
    cases: dict[str, Case]


def quantised_files(kinds: list[str], tolerance: float = 1e-5) -> dict[str, Case]:
    return {kind: Case(partial(quantised, kind=kind), tolerance) for kind in kinds}


ROWS: dict[str, Row] = {
    "`Load Diffusion Model`, `Load Checkpoint`": Row(SPLIT, {"unet": Case(unet), "checkpoint": Case(checkpoint)}),
    "`weight_dtype` `fp8_e4m3fn`, `fp8_e4m3fn_fast`, `fp8_e5m2`": Row(
        SPLIT, {kind: Case(partial(unet, weight_dtype=kind)) for kind in ("fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2")}
    ),
    "fp16 and bf16 storage": Row(SPLIT, {"bf16": Case(BF16), "fp16": Case(partial(stored, dtype=torch.float16))}),
    "Scaled fp8 files": Row(SPLIT, quantised_files(["scaled_fp8"])),
    "Quantised files: `float8_e4m3fn`, `float8_e5m2`, `mxfp8`, `nvfp4`, `convrot_w4a4`": Row(
        SPLIT, quantised_files(["nvfp4", "mxfp8", "float8_e4m3fn", "float8_e5m2", "convrot_w4a4"])
    ),
    "Quantised files: `int8_tensorwise`, plain and with ConvRot": Row(SPLIT, quantised_files(["int8_tensorwise", "int8_convrot"], COARSE)),
    "LoRA, alone and in a stack": Row(SPLIT, {"stack": Case(stack), "lora": Case(adapted("lora"))}),
    "LoHa, LoKr, DoRA, OFT, BOFT, GLoRA": Row(
        SPLIT, {kind: Case(adapted(kind)) for kind in ("dora", "loha", "lokr", "oft", "boft", "glora")}
    ),
    "Files of full differences or of whole weights": Row(SPLIT, {"diff": Case(adapted("diff")), "set": Case(adapted("set"))}),
    "LoRA that changes a layer's shape (FLUX control LoRA)": Row(SPLIT, {"control": Case(adapted("control"))}),
    "LoRA on any of the files above": Row(
        SPLIT,
        {
            "fp8": Case(adapted("lora", FP8)),
            "nvfp4": Case(adapted("lora", partial(quantised, kind="nvfp4"))),
            "bf16": Case(adapted("lora", BF16)),
            "scaled_fp8": Case(adapted("lora", partial(quantised, kind="scaled_fp8"))),
            "mxfp8": Case(adapted("lora", partial(quantised, kind="mxfp8"))),
            "convrot_w4a4": Case(adapted("lora", partial(quantised, kind="convrot_w4a4"))),
            "int8_tensorwise": Case(adapted("lora", partial(quantised, kind="int8_tensorwise")), COARSE),
            "checkpoint": Case(adapted("lora", checkpoint)),
        },
    ),
    "`ModelMergeSimple`, `ModelMergeBlocks` (`ModelMergeFlux1`), `ModelMergeAdd`, `ModelMergeSubtract`": Row(
        SPLIT,
        {
            "simple": Case(merged("ModelMergeSimple", adapted("lora", other), ratio=0.3)),
            "blocks": Case(merged("ModelMergeFlux1", **{"img_in.": 0.2, "double_blocks.0.": 0.6, "final_layer.": 0.9})),
            "add": Case(merged("ModelAdd")),
            "subtract": Case(merged("ModelSubtract", multiplier=0.4)),
        },
    ),
    "Weight patches of other packs: with functions, with adapter classes of their own": Row(
        SPLIT, {"function": Case(function), "adapter": Case(foreign_adapter)}
    ),
    "`ModelComputeDtype`": Row(SPLIT, {"bf16": Case(compute_dtype, HALF)}),
    "`Load LoRA (Bypass)`": Row(SINGLE, {"bypass": Case(bypassed, sentence="a node injects code into the model")}),
    "Weight wrappers of other packs; nodes that replace layers of the model": Row(
        SINGLE,
        {
            "wrapper": Case(wrapped, sentence="a node wraps the model's weights"),
            "layer": Case(replaced, sentence="a node replaced diffusion_model.img_in inside the model"),
        },
    ),
    "GGUF-style loaders: layers or tensors that ComfyUI does not have": Row(
        SINGLE,
        {
            "layers": Case(standins.own_layers, sentence="its loader brings its own layer operations"),
            "tensors": Case(standins.own_tensors, sentence="which only the model's own loader understands"),
        },
    ),
}
CASES = {f"{row} [{name}]": (row, case) for row, kept in ROWS.items() for name, case in kept.cases.items()}
