"""What ComfyUI is told of the memory that a step needs on this card while several cards share it.

Its own estimate, ``BaseModel.memory_required``, counts the pixels of the whole latent. From it ComfyUI decides how much of a model
is loaded beside it, and how many conditions go into one batch. While a run is split this object stands in its place and takes
the part that one card needs, the busiest one: the same number is right for every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management
import comfy.sampler_helpers

from ..sequence.replace import replace


class Estimate:
    """``active`` from before the model is loaded until ``close`` or ``whole``.

    args: those of ``comfy.sampler_helpers.prepare_sampling`` (model, shape of the latent, conditions). part: the part of a
    whole step's memory that a card needs for latents of a shape. rows: of the latent. conditions: how many a step may have.
    ``others``: models that are loaded beside it.
    """

    def __init__(self, args: Sequence[Any], part: Callable[[Sequence[int]], float]):
        self._patcher, shape, conds = args[:3]
        self.rows, self.conditions = shape[0], len(conds)
        self.others: list[Any] = []
        controls = comfy.sampler_helpers.get_additional_models(conds, self._patcher.model_dtype())[1]  # ControlNets stay whole
        self._needs = [needed + controls for needed in comfy.sampler_helpers.estimate_memory(*args[:3])]
        model = self._patcher.model
        stock = model.memory_required
        self._undo: Callable[[], None] | None = replace(
            model, "memory_required", lambda shape, *args, **kwargs: stock(shape, *args, **kwargs) * part(shape)
        )

    @property
    def active(self) -> bool:
        return self._undo is not None

    def close(self) -> None:
        """ComfyUI's own estimate again."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def whole(self) -> None:
        """Steps may be computed alone from now on: ComfyUI makes room for them, if need be by moving weights off the card."""
        self.close()
        most, least = self._needs
        comfy.model_management.load_models_gpu([self._patcher, *self.others], memory_required=most, minimum_memory_required=least)
