"""What ComfyUI's models of several kinds say of their noise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def make(schedule: type, kind: type, **settings: Any) -> Any:
    """A ``model_sampling`` of these two of ComfyUI's classes."""
    return type("ModelSampling", (schedule, kind), {})(SimpleNamespace(sampling_settings=settings))


def flow(shift: float = 1.0) -> Any:
    from comfy.model_sampling import CONST, ModelSamplingDiscreteFlow

    return make(ModelSamplingDiscreteFlow, CONST, shift=shift)
