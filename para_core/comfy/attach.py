"""What a node does to a model: attach frozen settings and the one wrapper that reads them when sampling starts."""

from __future__ import annotations

from typing import Any

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP

from ..settings import Accelerate, Attention, Cache, Compile, Parallel
from .session import KEY, sample

Settings = Accelerate | Parallel | Attention | Cache | Compile


def attach(model: comfy.model_patcher.ModelPatcher, settings: Settings) -> comfy.model_patcher.ModelPatcher:
    """A clone of ``model`` with ``settings`` among its options; the later of two of a kind wins."""
    model = model.clone()
    found: dict[str, Any] = dict(model.model_options.get(KEY, {}))
    kind = type(settings).__name__
    if kind in found and found[kind] != settings:
        sentence = f"Two nodes set {kind} on this model: the later one wins, {settings}."
        found["notes"] = list(dict.fromkeys([*found.get("notes", []), sentence]))  # said by the run, where it can be seen
    found[kind] = settings
    model.model_options[KEY] = found
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, sample)
    return model
