"""Tiny models as stock ModelPatchers, and prompts for them: what whole runs need besides a builder's forward call.

A new family adds one line to MODELS.
"""

from __future__ import annotations

from typing import Any

import torch

from .cases import CASES, UNCUT
from .tiny import kandinsky, ltx, noise

POOLED = {"pooled_output": noise(1, 24, seed=3)}

# case: ComfyUI's configuration of it, and what a prompt carries besides its text
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux": ("Flux", POOLED),
    "chroma": ("Chroma", {}),
    "hunyuan video": ("HunyuanVideo", POOLED),
    "mochi": ("GenmoMochi", {"attention_mask": (torch.arange(16)[None] < 11).long()}),
    "cogvideox": ("CogVideoX_T2V", {}),
    "wan": ("WAN21_T2V", {}),
    "minimax": ("MiniMaxH3", {}),
    "qwen image": ("QwenImage", {}),
    "qwen image edit": ("QwenImage", {"reference_latents": [noise(1, 16, 1, 6, 10, seed=9)]}),
    "ltx video": ("LTXV", {"attention_mask": torch.ones(1, 11).long()}),
    "ltx 2": ("LTXAV", {"attention_mask": torch.ones(1, 11).long()}),
    "sd3.5 medium": ("SD3", POOLED),
    "lumina 2": ("Lumina2", {}),
    "z-image": ("ZImage", {}),
    "hidream": ("HiDream", {**POOLED, "conditioning_llama3": noise(1, 3, 5, 44, seed=4)}),
    "omnigen2": ("Omnigen2", {"attention_mask": torch.ones(1, 11).long()}),
    "cosmos predict2": ("CosmosT2IPredict2", {}),
    "krea 2": ("Krea2", {}),
    "kandinsky 5": ("Kandinsky5", {"pooled_output": noise(1, 24, seed=3)}),
    "unet": ("SDXL", POOLED),
    "aura": ("AuraFlow", {}),
    "ernie": ("ErnieImage", {}),
    "pixart": ("PixArtAlpha", {}),
}

# as many channels as ComfyUI's latents of the family have
BUILDERS = {
    **CASES,
    **UNCUT,
    "ltx video": lambda: ltx.ltxv(channels=128),
    "ltx 2": lambda: ltx.ltxav(channels=128),
    "kandinsky 5": lambda: kandinsky.kandinsky(channels=33),
}


def patcher(name: str) -> tuple[Any, dict[str, Any]]:
    """A stock ModelPatcher of a tiny model, and the call that its builder gives."""
    import comfy.model_patcher
    import comfy.supported_models

    tiny, call = BUILDERS[name]()
    config = getattr(comfy.supported_models, MODELS[name][0])(tiny.tiny_config)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device=torch.device("cpu"))
    model.diffusion_model.load_state_dict(tiny.state_dict())
    model.eval().requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu")), call


def prompt(name: str, call: dict[str, Any], scale: float = 1.0, tokens: int | None = None) -> list:
    """A conditioning: the text of ``call``, scaled and cut to ``tokens``, with what the family's text encoder adds."""
    return [[scale * call["context"][:1, :tokens], dict(MODELS[name][1])]]
