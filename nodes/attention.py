"""Attention Backend."""

from __future__ import annotations

from comfy_api.latest import io

from ..para_core.attention.choice import SETTINGS
from ..para_core.comfy import attach
from ..para_core.settings import Attention


class ParaAttention(io.ComfyNode):
    """Attention runs on the kernel you name, or on the fastest one this machine has."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ParaAttention",
            display_name="Attention Backend",
            category="ParaDiT",
            description=cls.__doc__,
            search_aliases=["sage attention", "flash attention", "cudnn attention"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with."),
                io.Combo.Input(
                    "backend",
                    options=list(SETTINGS),
                    default="auto",
                    tooltip="auto = the fastest; exact = the fastest that does not quantise. What is missing is named.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with this attention kernel.")],
        )

    @classmethod
    def execute(cls, model, backend: str) -> io.NodeOutput:
        return io.NodeOutput(attach.attach(model, Attention(backend)))
