"""Compile Blocks."""

from __future__ import annotations

from comfy_api.latest import io

from ..para_core.comfy import attach
from ..para_core.settings import Compile


class ParaCompile(io.ComfyNode):
    """The model's blocks are compiled once, and whole forwards are replayed as CUDA graphs where that works."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ParaCompile",
            display_name="Compile Blocks",
            category="ParaDiT",
            description=cls.__doc__,
            search_aliases=["torch compile", "cuda graphs"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with."),
                io.Combo.Input(
                    "mode",
                    options=["off", "compile", "graph", "compile+graph"],
                    default="compile+graph",
                    tooltip="compile = torch.compile block by block; graph = CUDA graphs (NVIDIA, weights that stay on the GPU).",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with compiled blocks.")],
        )

    @classmethod
    def execute(cls, model, mode: str) -> io.NodeOutput:
        return io.NodeOutput(attach.attach(model, Compile(mode)))
