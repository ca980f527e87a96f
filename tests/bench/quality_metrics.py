"""How far a picture is from the one it should be, and how a set of pictures is summed up."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from skimage.metrics import structural_similarity

CEILING = 80.0  # dB: what two equal pictures count as in a mean


def psnr(result: torch.Tensor, expected: torch.Tensor, span: float) -> float:
    """Peak signal-to-noise ratio in dB of two tensors whose values cover `span`."""
    error = float((result.double() - expected.double()).square().mean())
    return min(CEILING, 10 * math.log10(span * span / error)) if error > 0 else CEILING


def ssim(result: torch.Tensor, expected: torch.Tensor, span: float, channels: int) -> float:
    """Structural similarity with the Gaussian window of the original paper; `channels`: the axis of the channels."""
    return float(
        structural_similarity(
            expected.double().numpy(), result.double().numpy(), data_range=span, channel_axis=channels,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )
    )  # fmt: skip


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def worst(values: Sequence[float]) -> float:
    """Mean of the worst 5 %, at least one."""
    return float(np.mean(np.sort(values)[: max(1, round(0.05 * len(values)))]))


def at(saved: float, curve: Sequence[tuple[float, float]]) -> float | None:
    """The value of a curve of (saved, value) points, by straight lines between neighbours; None outside of it."""
    points = sorted(curve)
    for (left, low), (right, high) in zip(points, points[1:], strict=False):
        if left <= saved <= right:
            return low if right == left else low + (high - low) * (saved - left) / (right - left)
    return None
