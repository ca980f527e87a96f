"""Seconds per sampling step of whole models, through the same session code that the nodes use."""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass, replace

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import torch

from para_core.comfy.attach import attach
from para_core.settings import Attention, Compile, Parallel

FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 5120,
    "ffn_dim": 13824,
    "num_heads": 40,
    "num_layers": 40,
    "patch_size": (1, 2, 2),
    "in_dim": 16,
    "out_dim": 16,
    "freq_dim": 256,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
}
HUNYUAN = {
    "image_model": "hunyuan_video",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 20,
    "depth_single_blocks": 40,
    "axes_dim": [16, 56, 56],
    "theta": 256,
    "qkv_bias": True,
    "guidance_embed": True,
    "meanflow": False,
    "meanflow_sum": False,
    "byt5": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
}
COGVIDEOX = {
    "image_model": "cogvideox",
    "num_attention_heads": 48,
    "attention_head_dim": 64,
    "in_channels": 16,
    "patch_size": 2,
    "num_layers": 42,
    "time_embed_dim": 512,
    "text_embed_dim": 4096,
    "use_rotary_positional_embeddings": True,
}


@dataclass(frozen=True)
class Case:
    """A model's configuration, the latent's shape, and text tokens x width."""

    config: dict
    latent: tuple[int, ...]
    text: tuple[int, int]
    pooled: int = 0
    steps: int = 6


CASES = {
    "flux-1024": Case(FLUX, (1, 16, 128, 128), (512, 4096), 768),
    "flux-2048": Case(FLUX, (1, 16, 256, 256), (512, 4096), 768),
    "wan-480p": Case(WAN, (1, 16, 21, 60, 104), (512, 4096), steps=5),
    "hunyuan-720p": Case(HUNYUAN, (1, 16, 33, 90, 160), (256, 4096), 768, steps=4),
    "cogvideox-5b": Case(COGVIDEOX, (1, 16, 13, 60, 90), (226, 4096), steps=5),
}


def tiny(case: Case) -> Case:
    """The same with two blocks of each kind and few tokens."""
    small = {"depth": 2, "depth_single_blocks": 2, "hidden_size": 384, "num_heads": 3, "num_layers": 2, "dim": 384, "ffn_dim": 512}
    small |= {"num_attention_heads": 3}
    config = {name: small.get(name, value) for name, value in case.config.items()}
    return replace(case, config=config, latent=(*case.latent[:2], *(4 for _ in case.latent[2:])), steps=3)


def build(case: Case) -> comfy.model_patcher.ModelPatcher:
    """A model of ComfyUI's own classes with random weights, made on its device."""
    device = comfy.model_management.get_torch_device()
    config = comfy.model_detection.model_config_from_unet_config(case.config)
    config.set_inference_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32, None)
    model = config.get_model({}, "", device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.diffusion_model.parameters():
        parameter.data.normal_(std=0.02, generator=generator)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


def run(model: comfy.model_patcher.ModelPatcher, case: Case) -> tuple[torch.Tensor, list[float]]:
    """Latents, and the seconds of each step but the first, which warms up."""
    generator = torch.Generator().manual_seed(1)
    context = torch.randn(1, *case.text, generator=generator)
    extra = {"pooled_output": torch.randn(1, case.pooled, generator=generator)} if case.pooled else {}
    noise = torch.randn(case.latent, generator=generator)
    stamps: list[float] = []

    def stamp(*_args) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())

    with torch.inference_mode():
        latents = comfy.sample.sample(
            model, noise, case.steps, 1.0, "euler", "simple", [[context, extra]], [[context, extra]], torch.zeros(case.latent),
            disable_pbar=True, callback=stamp, seed=1,
        )  # fmt: skip
    return latents.float(), [after - before for before, after in itertools.pairwise(stamps)]


def measure(names: list[str], backends: list[str], modes: list[str], *, quick: bool) -> list[dict[str, object]]:
    cuda = torch.cuda.is_available()
    ranks = [2] if not cuda else [count for count in (2, 4, 8) if count <= torch.cuda.device_count()]
    rows: list[dict[str, object]] = []
    for name in names:
        case = CASES[name] if cuda and not quick else tiny(CASES[name])
        model = build(case)
        ways = {"stock": model}
        for backend in backends:
            for mode in modes:
                one = attach(attach(model, Attention(backend)), Compile(mode))
                ways[f"1 rank, {backend}, {mode}"] = one
                ways |= {f"{count} ranks, {backend}, {mode}": attach(one, Parallel(gpus=count)) for count in ranks}
        reference, stock = None, 0.0
        for way, patched in ways.items():
            run(patched, case)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            latents, times = run(patched, case)
            seconds = statistics.median(times)
            if reference is None:
                reference, stock = latents, seconds
            error = float((latents - reference).norm() / reference.norm())
            row = {
                "case": name,
                "way": way,
                "step_ms": round(seconds * 1e3, 1),
                "spread_ms": round((max(times) - min(times)) * 1e3, 1),
                "over_stock": round(stock / seconds, 3),
                "error": f"{error:.1e}",
                "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
            }
            print(row, flush=True)
            rows.append(row)
        comfy.model_management.unload_all_models()
        del model, ways, patched
    return rows
