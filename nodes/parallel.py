"""Split Steps Across GPUs."""

from __future__ import annotations

from comfy_api.latest import io

from ..para_core.comfy import attach, sidecars
from ..para_core.settings import Parallel

COUNT = {"default": 0, "min": 0, "max": 64}  # of GPUs; 0 = choose


class ParaParallel(io.ComfyNode):
    """Every sampling step is shared by several GPUs of this machine; the result stays the same up to rounding."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ParaParallel",
            display_name="Split Steps Across GPUs",
            category="ParaDiT",
            description=cls.__doc__,
            search_aliases=["multi gpu", "sequence parallel", "ulysses", "ring attention", "context parallel"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with. LoRA and other MODEL nodes may come before or after."),
                io.Int.Input(
                    "gpus",
                    **COUNT,
                    tooltip="GPUs to use, this model's own included. 0 = all visible ones. Without CUDA: CPU processes, for trying it out.",
                ),
                io.Int.Input(
                    "batch_degree",
                    **COUNT,
                    tooltip="GPUs that share the batch: positive and negative prompt, and the images of a batch. 0 = choose.",
                ),
                io.Int.Input("ulysses_degree", **COUNT, tooltip="GPUs that share the attention heads of a sequence. 0 = choose."),
                io.Int.Input("ring_degree", **COUNT, tooltip="GPUs that pass keys and values round a ring. 0 = choose."),
                io.String.Input("devices", default="", tooltip='CUDA devices beside the model\'s own, such as "1,3". Empty = choose.'),
            ],
            outputs=[io.Model.Output(tooltip="The model, sampling on several GPUs.")],
        )

    @classmethod
    def execute(cls, model, gpus: int, batch_degree: int, ulysses_degree: int, ring_degree: int, devices: str) -> io.NodeOutput:
        settings = Parallel(gpus, batch_degree, ulysses_degree, ring_degree, devices)
        sidecars.warm(settings, model.load_device)
        return io.NodeOutput(attach.attach(model, settings))
