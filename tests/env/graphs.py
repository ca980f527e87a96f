"""Graphs in ComfyUI's API format, built from stock nodes, with other nodes put between loader and sampler.

`patches` is a list of (node id, inputs): MODEL nodes, chained in that order after the loader (and the LoRA, if any),
such as [parallel(gpus=2), first_block_cache(0.1)].
Nodes are named after their role, so that results can be asked for by name: "sampler", "latent" (SaveLatent), "image"
(SaveImage), "sampler_2" and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from assets import glyphs, prompts

from . import models

Patch = tuple[str, dict[str, Any]]
Patches = Sequence[Patch]
Link = list[Any]  # [name of a node, index of its output]


@dataclass(frozen=True)
class Sampling:
    """How to sample. `custom` picks SamplerCustomAdvanced with that guider instead of KSampler."""

    steps: int = 4
    cfg: float = 1.0
    seed: int = 1
    sampler: str = "euler"
    scheduler: str = "simple"
    denoise: float = 1.0
    positive_tokens: int = 16
    negative_tokens: int = 16
    custom: str = ""  # "", "BasicGuider" or "CFGGuider"


def parallel(gpus: int = 2, batch: int = 0, ulysses: int = 0, ring: int = 0, devices: str = "") -> Patch:
    degrees = {"batch_degree": batch, "ulysses_degree": ulysses, "ring_degree": ring}
    return "ParaParallel", {"gpus": gpus, **degrees, "devices": devices}


def attention(backend: str = "auto") -> Patch:
    return "ParaAttention", {"backend": backend}


def first_block_cache(threshold: float = 0.08, **changes: Any) -> Patch:
    inputs = {"start_percent": 0.0, "end_percent": 1.0, "max_consecutive_hits": -1, "predictor": "reuse"}
    return "ParaFirstBlockCache", {"threshold": threshold, **inputs, **changes}


class Builder:
    """A graph under construction; `nodes` is the result."""

    def __init__(self) -> None:
        self.nodes: dict[str, dict[str, Any]] = {}

    def add(self, name: str, class_type: str, **inputs: Any) -> Link:
        """Add a node, numbering the name when it is taken, and return a link to its first output."""
        unique, number = name, 2
        while unique in self.nodes:
            unique, number = f"{name}_{number}", number + 1
        self.nodes[unique] = {"class_type": class_type, "inputs": inputs}
        return [unique, 0]

    def model(self, file: str, patches: Patches = (), lora: tuple[str, float] | None = None) -> Link:
        model = self.add("model", "UNETLoader", unet_name=file, weight_dtype="default")
        return self.patched(model, patches, lora)

    def patched(self, model: Link, patches: Patches, lora: tuple[str, float] | None = None) -> Link:
        if lora is not None:
            name, strength = lora
            model = self.add("lora", "LoraLoaderModelOnly", model=model, lora_name=name, strength_model=strength)
        for class_type, inputs in patches:
            model = self.add(class_type, class_type, model=model, **inputs)
        return model

    def conditioning(self, sampling: Sampling, width: int, pooled_width: int) -> tuple[Link, Link]:
        shape = {"width": width, "pooled_width": pooled_width}
        positive = self.add("positive", "TestConditioning", seed=11, tokens=sampling.positive_tokens, **shape)
        negative = self.add("negative", "TestConditioning", seed=12, tokens=sampling.negative_tokens, **shape)
        return positive, negative

    def controlled(self, positive: Link, negative: Link, strength: float, size: tuple[int, int]) -> tuple[Link, Link]:
        """Both under a ControlNet, whose picture is a square on a ground of another colour."""
        width, height = size
        ground = self.add("ground", "EmptyImage", width=width, height=height, batch_size=1, color=0x2050A0)
        square = self.add("square", "EmptyImage", width=width // 3, height=height // 3, batch_size=1, color=0xF0C010)
        picture = self.add(
            "picture", "ImageCompositeMasked", destination=ground, source=square, x=width // 4, y=height // 3, resize_source=False
        )
        net = self.add("control_net", "ControlNetLoader", control_net_name=models.FLUX_CONTROL_FILE)
        inputs = {"positive": positive, "negative": negative, "control_net": net, "image": picture, "strength": strength}
        name, _ = self.add("control", "ControlNetApplyAdvanced", **inputs, start_percent=0.0, end_percent=1.0)
        return [name, 0], [name, 1]

    def sample(self, sampling: Sampling, model: Link, positive: Link, negative: Link, latent: Link) -> Link:
        if not sampling.custom:
            return self.add(
                "sampler",
                "KSampler",
                model=model,
                seed=sampling.seed,
                steps=sampling.steps,
                cfg=sampling.cfg,
                sampler_name=sampling.sampler,
                scheduler=sampling.scheduler,
                positive=positive,
                negative=negative,
                latent_image=latent,
                denoise=sampling.denoise,
            )
        if sampling.custom == "BasicGuider":
            guider = self.add("guider", "BasicGuider", model=model, conditioning=positive)
        else:
            guider = self.add(
                "guider", sampling.custom, model=model, positive=positive, negative=negative, cfg=sampling.cfg
            )
        sigmas = self.add(
            "sigmas",
            "BasicScheduler",
            model=model,
            scheduler=sampling.scheduler,
            steps=sampling.steps,
            denoise=sampling.denoise,
        )
        return self.add(
            "sampler",
            "SamplerCustomAdvanced",
            noise=self.add("noise", "RandomNoise", noise_seed=sampling.seed),
            guider=guider,
            sampler=self.add("algorithm", "KSamplerSelect", sampler_name=sampling.sampler),
            sigmas=sigmas,
            latent_image=latent,
        )

    def save(self, latent: Link) -> None:
        self.add("latent", "SaveLatent", samples=latent, filename_prefix="latent")

    def save_image(self, latent: Link, vae: Link) -> None:
        image = self.add("decode", "VAEDecode", samples=latent, vae=vae)
        self.add("image", "SaveImage", images=image, filename_prefix="image")


def flux(
    patches: Patches = (),
    sampling: Sampling = Sampling(),
    *,
    width: int = 128,
    height: int = 128,
    batch: int = 1,
    lora: float | None = None,
    control: float = 0.0,
    checkpoint: bool = False,
    decode: bool = False,
    latent_size: tuple[int, int] | None = None,
) -> dict[str, dict[str, Any]]:
    """A FLUX image. width and height in pixels, multiples of 16; latent_size (width, height) in latent pixels instead.

    lora: strength of the LoRA; None leaves the node out. control: strength of the ControlNet; 0 leaves it out.
    checkpoint: the model from a full checkpoint.
    decode: also save the picture, as node "image".
    """
    graph = Builder()
    lora_node = None if lora is None else (models.FLUX_LORA_FILE, lora)
    if checkpoint:
        loader = graph.add("model", "CheckpointLoaderSimple", ckpt_name=models.FLUX_CHECKPOINT_FILE)
        model = graph.patched(loader, patches, lora_node)
    else:
        model = graph.model(models.FLUX_FILE, patches, lora_node)
    positive, negative = graph.conditioning(sampling, models.FLUX_TEXT_WIDTH, models.FLUX_POOLED_WIDTH)
    if control:
        positive, negative = graph.controlled(positive, negative, control, (width, height))
    if latent_size is not None:
        columns, rows = latent_size
        empty = graph.add(
            "empty", "TestLatent", width=columns, height=rows, frames=0, batch_size=batch, channels=models.LATENT_CHANNELS
        )
    else:
        empty = graph.add("empty", "EmptySD3LatentImage", width=width, height=height, batch_size=batch)
    latent = graph.sample(sampling, model, positive, negative, empty)
    graph.save(latent)
    if decode:
        vae = ["model", 2] if checkpoint else graph.add("vae", "VAELoader", vae_name=models.VAE_FILE)
        graph.save_image(latent, vae)
    return graph.nodes


def emoji(
    prompt: str,
    patches: Patches = (),
    sampling: Sampling = Sampling(steps=25, cfg=4.0),
    *,
    size: int = glyphs.SIZE,
) -> dict[str, dict[str, Any]]:
    """A picture by the small trained model, as node "image"; the negative prompt is empty. `size` in pixels."""
    graph = Builder()
    model = graph.model(prompts.FLUX_FILE, patches)
    positive, negative = graph.add("positive", "TestEmojiPrompt", text=prompt), graph.add("negative", "TestEmojiPrompt", text="")
    empty = graph.add("empty", "EmptySD3LatentImage", width=size, height=size, batch_size=1)
    latent = graph.sample(sampling, model, positive, negative, empty)
    graph.save(latent)
    graph.save_image(latent, graph.add("vae", "VAELoader", vae_name=prompts.VAE_FILE))
    return graph.nodes


def wan(
    patches: Patches = (),
    sampling: Sampling = Sampling(),
    *,
    width: int = 96,
    height: int = 64,
    frames: int = 9,
    batch: int = 1,
    lora: float | None = None,
    latent_size: tuple[int, int, int] | None = None,
) -> dict[str, dict[str, Any]]:
    """A Wan video of 4n+1 frames; width and height in pixels, multiples of 16; or latent_size (width, height, frames)."""
    graph = Builder()
    model = graph.model(models.WAN_FILE, patches, None if lora is None else (models.WAN_LORA_FILE, lora))
    positive, negative = graph.conditioning(sampling, models.WAN_TEXT_WIDTH, 0)
    empty = _empty_video(graph, width, height, frames, batch, latent_size)
    graph.save(graph.sample(sampling, model, positive, negative, empty))
    return graph.nodes


def wan_two_models(
    patches: Patches = (),
    sampling: Sampling = Sampling(),
    *,
    low_noise_patches: Patches | None = None,
    switch_at: int = 2,
    width: int = 96,
    height: int = 64,
    frames: int = 9,
    batch: int = 1,
) -> dict[str, dict[str, Any]]:
    """The Wan 2.2 pattern: one model for steps below `switch_at`, another for the rest, two KSamplerAdvanced.

    The second model gets `low_noise_patches`, by default the same as the first.
    """
    graph = Builder()
    high = graph.model(models.WAN_FILE, patches)
    low = graph.model(models.WAN_LOW_NOISE_FILE, patches if low_noise_patches is None else low_noise_patches)
    positive, negative = graph.conditioning(sampling, models.WAN_TEXT_WIDTH, 0)
    latent = _empty_video(graph, width, height, frames, batch, None)
    for model, first, last in ((high, 0, switch_at), (low, switch_at, sampling.steps)):
        latent = graph.add(
            "sampler",
            "KSamplerAdvanced",
            model=model,
            add_noise="enable" if first == 0 else "disable",
            noise_seed=sampling.seed,
            steps=sampling.steps,
            cfg=sampling.cfg,
            sampler_name=sampling.sampler,
            scheduler=sampling.scheduler,
            positive=positive,
            negative=negative,
            latent_image=latent,
            start_at_step=first,
            end_at_step=last,
            return_with_leftover_noise="enable" if last < sampling.steps else "disable",
        )
    graph.save(latent)
    return graph.nodes


def flux_two_passes(
    patches: Patches = (),
    sampling: Sampling = Sampling(),
    *,
    width: int = 96,
    height: int = 96,
    batch: int = 1,
    denoise: float = 0.6,
) -> dict[str, dict[str, Any]]:
    """A hires second pass: sample, enlarge the latent by half, sample again with the same patched model."""
    graph = Builder()
    model = graph.model(models.FLUX_FILE, patches)
    positive, negative = graph.conditioning(sampling, models.FLUX_TEXT_WIDTH, models.FLUX_POOLED_WIDTH)
    empty = graph.add("empty", "EmptySD3LatentImage", width=width, height=height, batch_size=batch)
    first = graph.sample(sampling, model, positive, negative, empty)
    larger = graph.add("larger", "LatentUpscaleBy", samples=first, upscale_method="bilinear", scale_by=1.5)
    second = graph.sample(replace(sampling, denoise=denoise), model, positive, negative, larger)
    graph.save(second)
    return graph.nodes


def _empty_video(
    graph: Builder, width: int, height: int, frames: int, batch: int, latent_size: tuple[int, int, int] | None
) -> Link:
    if latent_size is None:
        return graph.add(
            "empty", "EmptyHunyuanLatentVideo", width=width, height=height, length=frames, batch_size=batch
        )
    columns, rows, latent_frames = latent_size
    return graph.add(
        "empty",
        "TestLatent",
        width=columns,
        height=rows,
        frames=latent_frames,
        batch_size=batch,
        channels=models.LATENT_CHANNELS,
    )
