"""Tiny models with seeded random weights, in the file formats of the real ones.

    python models.py FOLDER     writes FOLDER/{diffusion_models,checkpoints,controlnet,vae,loras}/*.safetensors

Names and shapes of the tensors are what ComfyUI's model detection looks at, so the stock loaders take the files for
FLUX.1 and Wan 2.1 T2V with fewer, narrower blocks. Heads stay 128 wide, because detection derives their number from
the width; Wan's text width stays 4096, because detection takes it for granted. Everything is float32.

Every tensor is drawn from a generator seeded with its own name. Gains are chosen so that outputs are of order one,
follow sigma smoothly and depend on the conditioning: a random network would otherwise jump from step to step, which no
trained one does, and step caching could not be tried on it.
"""

from __future__ import annotations

import math
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

HEAD_DIM = 128
LATENT_CHANNELS = 16
PATCH = 2 * 2 * LATENT_CHANNELS  # numbers in one token's patch, both families
TIME_FREQUENCIES = 256

FLUX_FILE = "tiny_flux.safetensors"
FLUX_CHECKPOINT_FILE = "tiny_flux_checkpoint.safetensors"
FLUX_CONTROL_FILE = "tiny_flux_control.safetensors"
FLUX_LORA_FILE = "tiny_flux_lora.safetensors"
FLUX_TEXT_WIDTH = 128
FLUX_POOLED_WIDTH = 64
VAE_FILE = "tiny_flux_vae.safetensors"

WAN_FILE = "tiny_wan.safetensors"
WAN_LOW_NOISE_FILE = "tiny_wan_low_noise.safetensors"
WAN_LORA_FILE = "tiny_wan_lora.safetensors"
WAN_TEXT_WIDTH = 4096


@dataclass
class Weights:
    """A state dict under construction."""

    seed: int
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def normal(self, name: str, *shape: int, std: float, mean: float = 0.0) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + self.seed)
        self.tensors[name] = torch.randn(shape, generator=generator) * std + mean
        return self.tensors[name]

    def linear(self, name: str, out_features: int, in_features: int, gain: float = 1.0) -> None:
        self.normal(f"{name}.weight", out_features, in_features, std=gain / math.sqrt(in_features))
        self.normal(f"{name}.bias", out_features, std=0.05)

    def norm(self, name: str, width: int) -> None:
        self.normal(name, width, std=0.1, mean=1.0)

    def conv(self, name: str, out_channels: int, in_channels: int, gain: float = 1.0, bias: bool = True) -> None:
        self.normal(f"{name}.weight", out_channels, in_channels, 3, 3, std=gain / math.sqrt(9 * in_channels))
        if bias:
            self.normal(f"{name}.bias", out_channels, std=0.05)

    def time_embedding(self, name_in: str, name_out: str, width: int) -> None:
        """Two layers on cos and sin of 0..1000 times falling frequencies; the fast ones are damped for smoothness."""
        half = TIME_FREQUENCIES // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half) / half)
        damping = (1 / (1 + (300 * frequency) ** 2)).repeat(2)
        self.linear(name_in, width, TIME_FREQUENCIES)
        self.tensors[f"{name_in}.weight"] *= damping / damping.square().mean().sqrt()
        self.linear(name_out, width, width)

    def output_layer(self, name: str, width: int, patch_weight: Tensor) -> None:
        """Mostly the transpose of the patch embedding [width, PATCH]: a first guess of the noise, as trained ones give."""
        self.linear(name, PATCH, width, gain=0.5)
        self.tensors[f"{name}.weight"] += patch_weight.T * (PATCH / width)


def flux(seed: int, heads: int, double_blocks: int, single_blocks: int) -> dict[str, Tensor]:
    """FLUX.1 dev: guidance embedding, separate modulation per block, mlp ratio 4."""
    w = Weights(seed)
    hidden = heads * HEAD_DIM
    w.linear("img_in", hidden, PATCH)
    w.linear("txt_in", hidden, FLUX_TEXT_WIDTH)
    w.time_embedding("time_in.in_layer", "time_in.out_layer", hidden)
    w.time_embedding("guidance_in.in_layer", "guidance_in.out_layer", hidden)
    w.linear("vector_in.in_layer", hidden, FLUX_POOLED_WIDTH)
    w.linear("vector_in.out_layer", hidden, hidden)
    for i in range(double_blocks):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            w.linear(f"{block}_mod.lin", 6 * hidden, hidden, gain=0.5)
            w.linear(f"{block}_attn.qkv", 3 * hidden, hidden)
            w.norm(f"{block}_attn.norm.query_norm.scale", HEAD_DIM)
            w.norm(f"{block}_attn.norm.key_norm.scale", HEAD_DIM)
            w.linear(f"{block}_attn.proj", hidden, hidden)
            w.linear(f"{block}_mlp.0", 4 * hidden, hidden)
            w.linear(f"{block}_mlp.2", hidden, 4 * hidden)
    for i in range(single_blocks):
        block = f"single_blocks.{i}"
        w.linear(f"{block}.modulation.lin", 3 * hidden, hidden, gain=0.5)
        w.linear(f"{block}.linear1", 7 * hidden, hidden)
        w.linear(f"{block}.linear2", hidden, 5 * hidden)
        w.norm(f"{block}.norm.query_norm.scale", HEAD_DIM)
        w.norm(f"{block}.norm.key_norm.scale", HEAD_DIM)
    w.linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden, gain=0.3)
    w.output_layer("final_layer.linear", hidden, w.tensors["img_in.weight"])
    return w.tensors


def flux_control(seed: int, heads: int, double_blocks: int, single_blocks: int) -> dict[str, Tensor]:
    """A ControlNet for ``flux`` that takes a picture: a smaller FLUX without an end, with a residual for every block."""
    tensors = flux(seed, heads, double_blocks, single_blocks)
    w = Weights(seed, {name: tensor for name, tensor in tensors.items() if not name.startswith("final_layer.")})
    hidden = heads * HEAD_DIM
    for layer in range(8):
        w.conv(f"input_hint_block.{2 * layer}", 16, 16 if layer else 3)
    w.linear("pos_embed_input", hidden, PATCH)
    for i in range(double_blocks):
        w.linear(f"controlnet_blocks.{i}", hidden, hidden)
    for i in range(single_blocks):
        w.linear(f"controlnet_single_blocks.{i}", hidden, hidden)
    return w.tensors


def wan(seed: int, heads: int, blocks: int, ffn: int) -> dict[str, Tensor]:
    """Wan 2.1 text to video."""
    w = Weights(seed)
    dim = heads * HEAD_DIM
    patch_weight = w.normal("patch_embedding.weight", dim, LATENT_CHANNELS, 1, 2, 2, std=1 / math.sqrt(PATCH))
    w.normal("patch_embedding.bias", dim, std=0.05)
    w.linear("text_embedding.0", dim, WAN_TEXT_WIDTH)
    w.linear("text_embedding.2", dim, dim)
    w.time_embedding("time_embedding.0", "time_embedding.2", dim)
    w.linear("time_projection.1", 6 * dim, dim, gain=0.5)
    for i in range(blocks):
        block = f"blocks.{i}"
        for attention in ("self_attn", "cross_attn"):
            for projection in "qkvo":
                w.linear(f"{block}.{attention}.{projection}", dim, dim)
            w.norm(f"{block}.{attention}.norm_q.weight", dim)
            w.norm(f"{block}.{attention}.norm_k.weight", dim)
        w.norm(f"{block}.norm3.weight", dim)
        w.normal(f"{block}.norm3.bias", dim, std=0.05)
        w.linear(f"{block}.ffn.0", ffn, dim)
        w.linear(f"{block}.ffn.2", dim, ffn)
        w.normal(f"{block}.modulation", 1, 6, dim, std=0.3)
    w.normal("head.modulation", 1, 2, dim, std=0.1)
    # the head lists a patch as (t, h, w, channel), the embedding as (channel, t, h, w)
    w.output_layer("head.head", dim, patch_weight.permute(0, 2, 3, 4, 1).reshape(dim, PATCH))
    return w.tensors


def tiny_autoencoder(seed: int) -> dict[str, Tensor]:
    """TAESD for 16-channel FLUX latents: two stacks of 64-channel convolutions (layer numbers are the format's).

    The decoder is near to a smooth picture of the latent: features come in pairs of opposite sign, the blocks change
    them a little, the convolutions after an upsampling blur, the last one turns features into colours.
    """
    w = Weights(seed)

    def blocks(stack: str, gain: float, *layers: int) -> None:
        for layer in layers:
            for k in (0, 2, 4):
                w.conv(f"{stack}.{layer}.conv.{k}", 64, 64, gain=gain)

    w.conv("taesd_encoder.0", 64, 3)
    blocks("taesd_encoder", 0.7, 1, 3, 4, 5, 7, 8, 9, 11, 12, 13)
    for layer in (2, 6, 10):
        w.conv(f"taesd_encoder.{layer}", 64, 64, bias=False)
    w.conv("taesd_encoder.14", LATENT_CHANNELS, 64)

    w.conv("taesd_decoder.1", 64, LATENT_CHANNELS)
    w.tensors["taesd_decoder.1.weight"][32:] = -w.tensors["taesd_decoder.1.weight"][:32]
    blocks("taesd_decoder", 0.5, 3, 4, 5, 8, 9, 10, 13, 14, 15, 18)
    blur = torch.outer(torch.tensor([0.25, 0.5, 0.25]), torch.tensor([0.25, 0.5, 0.25]))
    for layer in (7, 12, 17):
        w.tensors[f"taesd_decoder.{layer}.weight"] = torch.eye(64)[:, :, None, None] * blur
    w.conv("taesd_decoder.19", 3, 64, gain=0.6)
    w.tensors["taesd_decoder.19.weight"][:, 32:] = -w.tensors["taesd_decoder.19.weight"][:, :32]
    w.tensors["taesd_decoder.19.bias"] += 0.5  # a latent of zeros is mid grey

    w.tensors["vae_scale"] = torch.tensor(0.3611)
    w.tensors["vae_shift"] = torch.tensor(0.1159)
    return w.tensors


def low_rank(model: dict[str, Tensor], layers: tuple[str, ...], seed: int, kohya: bool, rank: int = 4) -> dict[str, Tensor]:
    """A LoRA on every linear layer whose name ends in one of `layers`; at strength 1 it changes a layer by about a third.

    kohya: `lora_unet_<name with underscores>.lora_down/lora_up/alpha`, else `diffusion_model.<name>.lora_A/lora_B`.
    """
    w = Weights(seed)
    for key, weight in model.items():
        name = key.removesuffix(".weight")
        if not key.endswith(".weight") or not name.endswith(layers):
            continue
        prefix = f"lora_unet_{name.replace('.', '_')}" if kohya else f"diffusion_model.{name}"
        down, up = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
        out_features, in_features = weight.shape
        w.normal(f"{prefix}.{down}.weight", rank, in_features, std=1 / math.sqrt(in_features))
        w.normal(f"{prefix}.{up}.weight", out_features, rank, std=0.5 / math.sqrt(rank))
        if kohya:
            w.tensors[f"{prefix}.alpha"] = torch.tensor(float(rank))
    return w.tensors


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def write_all(folder: Path) -> None:
    from safetensors.torch import save_file

    flux_model = flux(seed=1, heads=3, double_blocks=2, single_blocks=4)
    wan_model = wan(seed=2, heads=3, blocks=4, ffn=256)
    vae = tiny_autoencoder(seed=3)
    checkpoint = flux(seed=4, heads=1, double_blocks=2, single_blocks=4)
    files = {
        f"diffusion_models/{FLUX_FILE}": flux_model,
        f"diffusion_models/{WAN_FILE}": wan_model,
        f"diffusion_models/{WAN_LOW_NOISE_FILE}": wan(seed=5, heads=1, blocks=5, ffn=256),
        f"checkpoints/{FLUX_CHECKPOINT_FILE}": prefixed("model.diffusion_model.", checkpoint) | prefixed("vae.", vae),
        f"controlnet/{FLUX_CONTROL_FILE}": flux_control(seed=8, heads=3, double_blocks=1, single_blocks=1),
        f"vae/{VAE_FILE}": vae,
        f"loras/{FLUX_LORA_FILE}": low_rank(flux_model, ("attn.qkv", "linear1"), seed=6, kohya=True),
        f"loras/{WAN_LORA_FILE}": low_rank(wan_model, ("attn.q", "attn.v", "ffn.0"), seed=7, kohya=False),
    }
    for name, tensors in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
