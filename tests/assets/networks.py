"""The two networks in plain torch, with the tensor names and the arithmetic of the files that ComfyUI's loaders take.

`Flux` is FLUX.1 without guidance embedding ("schnell"), `Autoencoder` the 16-channel TAESD. Both are written for
training: no patches, no masks, one size. tests/server/test_trained_model.py compares them with ComfyUI's own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_DIM = 128
AXES = (16, 56, 56)  # rotary numbers of a head for (reference image, row, column)
CHANNELS = 16
PATCH = 2


def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [S, HEAD_DIM / 2] for positions [S, 3]."""
    angles = []
    for axis, width in enumerate(AXES):
        frequency = 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width)
        angles.append(positions[:, axis, None].double() * frequency)
    angle = torch.cat(angles, 1)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring pairs of x [B, H, S, D]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def waves(t: Tensor) -> Tensor:
    """Sinusoids [B, 256] of times 0..1."""
    frequency = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
    angle = 1000 * t.float()[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), -1)


class Embedder(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(width, hidden)
        self.out_layer = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class Modulation(nn.Module):
    def __init__(self, hidden: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.lin = nn.Linear(hidden, count * hidden)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vec))[:, None].chunk(self.count, -1)


class Scale(nn.Module):
    """RMS norm of queries or keys, with the weight under the name the format gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(HEAD_DIM))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (HEAD_DIM,), self.scale.float()).to(x.dtype)


class QKNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query_norm, self.key_norm = Scale(), Scale()

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.unflatten(-1, (3, -1, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        return self.query_norm(q), self.key_norm(k), v


class Attention(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.norm = QKNorm()
        self.proj = nn.Linear(hidden, hidden)


def attend(q: Tensor, k: Tensor, v: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    return F.scaled_dot_product_attention(rotate(q, *turn), rotate(k, *turn), v).transpose(1, 2).flatten(2)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class DoubleBlock(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_mod", Modulation(hidden, 6))
            self.add_module(f"{stream}_attn", Attention(hidden))
            mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU("tanh"), nn.Linear(4 * hidden, hidden))
            self.add_module(f"{stream}_mlp", mlp)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        img_mod, txt_mod = self.img_mod(vec), self.txt_mod(vec)
        txt_qkv = self.txt_attn.norm.heads(self.txt_attn.qkv(modulated(txt, *txt_mod[:2])))
        img_qkv = self.img_attn.norm.heads(self.img_attn.qkv(modulated(img, *img_mod[:2])))
        q, k, v = (torch.cat(pair, 2) for pair in zip(txt_qkv, img_qkv, strict=True))
        attention = attend(q, k, v, turn)
        txt_attention, img_attention = attention[:, : txt.shape[1]], attention[:, txt.shape[1] :]
        img = img + self.img_attn.proj(img_attention) * img_mod[2]
        img = img + self.img_mlp(modulated(img, *img_mod[3:5])) * img_mod[5]
        txt = txt + self.txt_attn.proj(txt_attention) * txt_mod[2]
        txt = txt + self.txt_mlp(modulated(txt, *txt_mod[3:5])) * txt_mod[5]
        return img, txt


class SingleBlock(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.modulation = Modulation(hidden, 3)
        self.linear1 = nn.Linear(hidden, 7 * hidden)
        self.linear2 = nn.Linear(5 * hidden, hidden)
        self.norm = QKNorm()

    def forward(self, x: Tensor, vec: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        qkv, mlp = self.linear1(modulated(x, shift, scale)).split((3 * self.hidden, 4 * self.hidden), -1)
        attention = attend(*self.norm.heads(qkv), turn)
        return x + self.linear2(torch.cat((attention, F.gelu(mlp, approximate="tanh")), -1)) * gate


class LastLayer(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, PATCH * PATCH * CHANNELS)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        return self.linear(modulated(x, *self.adaLN_modulation(vec)[:, None].chunk(2, -1)))


class Flux(nn.Module):
    """Predicts noise - picture for latents [B, 16, h, w] at times [B] in 0..1; context [B, T, context], pooled [B, pooled]."""

    def __init__(self, context: int, pooled: int, *, heads: int = 2, double: int = 2, single: int = 4) -> None:
        super().__init__()
        hidden = heads * HEAD_DIM
        self.img_in = nn.Linear(PATCH * PATCH * CHANNELS, hidden)
        self.txt_in = nn.Linear(context, hidden)
        self.time_in = Embedder(256, hidden)
        self.vector_in = Embedder(pooled, hidden)
        self.double_blocks = nn.ModuleList(DoubleBlock(hidden) for _ in range(double))
        self.single_blocks = nn.ModuleList(SingleBlock(hidden) for _ in range(single))
        self.final_layer = LastLayer(hidden)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            if isinstance(module, Modulation):
                nn.init.zeros_(module.lin.weight)
        for last in (self.final_layer.linear, self.final_layer.adaLN_modulation[1]):
            nn.init.zeros_(last.weight)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        h, w = x.shape[2] // PATCH, x.shape[3] // PATCH
        img = x.unflatten(3, (w, PATCH)).unflatten(2, (h, PATCH)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        grid = torch.cartesian_prod(torch.arange(h, device=x.device), torch.arange(w, device=x.device))
        turn = rotary(F.pad(grid, (1, 0, context.shape[1], 0)))
        img, txt = self.img_in(img).float(), self.txt_in(context).float()
        vec = self.time_in(waves(t)) + self.vector_in(pooled)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, turn)
        both = torch.cat((txt, img), 1)
        for block in self.single_blocks:
            both = block(both, vec, turn)
        out = self.final_layer(both[:, txt.shape[1] :], vec).unflatten(2, (CHANNELS, PATCH, PATCH)).unflatten(1, (h, w))
        return out.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class Residual(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        self.conv = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class Squash(nn.Module):
    """Keeps latents within +-3."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


class Autoencoder(nn.Module):
    """Pictures [B, 3, 8h, 8w] in 0..1 <-> latents [B, 16, h, w] as the model sees them (mean 0, deviation 1)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()

        def residuals(count: int) -> list[nn.Module]:
            return [Residual(width) for _ in range(count)]

        encoder: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), *residuals(1)]
        for _ in range(3):
            encoder += [nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False), *residuals(3)]
        decoder: list[nn.Module] = [Squash(), nn.Conv2d(CHANNELS, width, 3, padding=1), nn.ReLU()]
        for _ in range(3):
            upsample = nn.Upsample(scale_factor=2)
            decoder += [*residuals(3), upsample, nn.Conv2d(width, width, 3, padding=1, bias=False)]
        self.taesd_encoder = nn.Sequential(*encoder, nn.Conv2d(width, CHANNELS, 3, padding=1))
        self.taesd_decoder = nn.Sequential(*decoder, *residuals(1), nn.Conv2d(width, 3, 3, padding=1))

    def encode(self, pictures: Tensor) -> Tensor:
        return self.taesd_encoder(pictures)

    def decode(self, latents: Tensor) -> Tensor:
        return self.taesd_decoder(latents)
