"""What a node does to a model: attach frozen settings and the one wrapper that reads them when sampling starts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP

from ..settings import Accelerate, Attention, Cache, Compile, Parallel
from .session import KEY, sample

Settings = Accelerate | Parallel | Attention | Cache | Compile
TITLES: dict[type, str] = {
    Accelerate: "Accelerate Sampling",
    Parallel: "Split Steps Across GPUs",
    Attention: "Attention Backend",
    Cache: "First Block Cache",
    Compile: "Compile Blocks",
}


def attach(model: comfy.model_patcher.ModelPatcher, settings: Settings) -> comfy.model_patcher.ModelPatcher:
    """A clone of ``model`` with ``settings`` among its options; the later of two of a kind wins."""
    model = model.clone()
    found: dict[str, Any] = dict(model.model_options.get(KEY, {}))
    kind = type(settings).__name__
    if kind in found and found[kind] != settings:
        values = ", ".join(f"{name} {value!r}" for name, value in asdict(settings).items() if name != "careful")
        sentence = f"Two nodes {TITLES[type(settings)]} are on this model with different settings: the later one wins ({values})."
        found["notes"] = list(dict.fromkeys([*found.get("notes", []), sentence]))  # said by the run, where it can be seen
    found[kind] = settings
    model.model_options[KEY] = found
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, sample)
    return model
