"""Krea 2."""

from __future__ import annotations

from typing import Any

from .common import HEADS, WIDTH, Tiny, built, given, seeded


def krea(**extra: Any) -> Tiny:
    from comfy.ldm.krea2.model import SingleStreamDiT

    config = dict(features=WIDTH, heads=HEADS, kvheads=2, multiplier=1, layers=3, tdim=32, txtdim=20, txtlayers=2)
    model = built(SingleStreamDiT, image_model="krea2", txtheads=2, txtkvheads=2, **config)
    return seeded(model), given(2, 16, 1, 10, 14, **extra)
