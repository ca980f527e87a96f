"""Accelerate Sampling."""

from __future__ import annotations

from comfy_api.latest import io

from ..para_core.attention.choice import SETTINGS
from ..para_core.cache.presets import PRESETS
from ..para_core.comfy import attach
from ..para_core.settings import Accelerate
from .parallel import COUNT


class ParaAccelerate(io.ComfyNode):
    """Sampling as fast as this machine allows: several GPUs, a fast attention kernel, cached steps, compiled blocks."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ParaAccelerate",
            display_name="Accelerate Sampling",
            category="ParaDiT",
            description=cls.__doc__,
            search_aliases=["speed up", "faster", "multi gpu", "sage attention", "teacache", "torch compile"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with. LoRA and other MODEL nodes may come before or after."),
                io.Int.Input(
                    "gpus",
                    **COUNT,
                    tooltip="GPUs to use, this model's own included; 0 = all visible. A run that would lose by splitting is not split.",
                ),
                io.Combo.Input(
                    "attention",
                    options=list(SETTINGS),
                    default="auto",
                    tooltip="auto = the fastest kernel; exact = the fastest that does not quantise.",
                ),
                io.Combo.Input(
                    "cache",
                    options=["off", *PRESETS],
                    default="balanced",
                    tooltip="How many steps may be reused: quality = few, fast = many. Runs of few steps reuse none.",
                ),
                io.Combo.Input(
                    "compile",
                    options=["off", "auto"],
                    default="auto",
                    tooltip="auto = compile blocks where the model stays on its GPU; the first run takes longer.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, accelerated.")],
        )

    @classmethod
    def execute(cls, model, gpus: int, attention: str, cache: str, compile: str) -> io.NodeOutput:
        return io.NodeOutput(attach.attach(model, Accelerate(gpus, attention, cache, compile)))
