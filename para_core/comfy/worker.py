"""The sidecar's end of the glue: ComfyUI's own classes build, patch and run the models that rank 0 sends."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.model_prefetch
import torch
from comfy.ldm.modules.attention import optimized_attention

from ..attention.choice import Chooser
from ..attention.timings import Timings
from ..execution import gain
from ..execution.runner import Runner
from ..group.channel import Channel
from ..group.codec import dtype_named
from ..group.worker import Worker
from ..plans import plan_for
from ..sequence.hooks import Arguments
from ..sequence.mesh import Comm, Mesh
from . import calls, files, model
from .patches import Together
from .steps import heard


class ComfyHost:
    """``Host`` over ComfyUI. ``say`` hears what a run has to say to the user."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say

    def build(self, recipe: dict[str, Any], device: torch.device):
        return model.build(recipe, device)

    def fill(self, patcher, tensors: dict[str, torch.Tensor]) -> None:
        model.fill(patcher, tensors)

    def ready(self, patcher, options: dict[str, Any]) -> None:
        model.ready(patcher, options)

    def open_file(self, origin: dict[str, Any], device: torch.device):
        return files.open_file(origin, device)

    def load(self, patcher, patches: list, options: dict[str, Any]) -> None:
        files.load(patcher, patches, options)

    def opened(self, patcher) -> int | None:
        return int(patcher.loaded_size()) if files.opened(patcher) else None

    def free_memory(self, device: torch.device) -> int:
        reserved = comfy.model_management.extra_reserved_memory() if device.type == "cuda" else 0
        return int(comfy.model_management.get_free_memory(device) - reserved)

    def matrix_rate(self, device: torch.device, dtype: str) -> float:
        return gain.matrix_rate(device, dtype_named(dtype))

    def begin(self, patcher, run: dict[str, Any]) -> Run:
        return Run(patcher.model.diffusion_model, run, self._say, opened=files.opened(patcher))

    def forward(self, run: Run, share: dict[str, Any], mesh: Mesh, comm: Comm) -> torch.Tensor | None:
        return run.forward(share, mesh, comm)

    def end(self, run: Run) -> None:
        run.runner.remove()
        if run.opened:  # as rank 0's main program does after a node: buffers of weights that come from host memory
            comfy.model_management.reset_cast_buffers()
        comfy.model_prefetch.cleanup_prefetch_queues()


class Run:
    """One sampling run on a sidecar. ``opened``: its weights may be elsewhere than on the device."""

    def __init__(self, diffusion_model: torch.nn.Module, run: dict[str, Any], say: Callable[[str], None], *, opened: bool):
        self.opened = opened
        plan = plan_for(diffusion_model)
        assert plan is not None, "rank 0 has looked for it"
        self.names = calls.names(diffusion_model)
        self.function = getattr(diffusion_model, calls.entry(diffusion_model))
        chooser = Chooser(run["attention"], say=say, timings=Timings(table=run["kernels"]))
        self.runner = Runner(
            plan,
            diffusion_model,
            chooser,
            cached=run["cached"],
            compiled=run["compiled"],
            stock=optimized_attention,
            foreign=run["foreign"],
        )
        self.patches = Together(self.runner.hooks)

    @torch.inference_mode()
    def forward(self, share: dict[str, Any], mesh: Mesh, comm: Comm) -> torch.Tensor | None:
        """A replica's result as one flat tensor, on its first rank."""
        if share["kernels"]:
            self.runner.learn(share["kernels"])
        self.runner.override.ways.learn(share["ways"])
        args, kwargs = share["part"]
        arguments = Arguments(self.names, args, kwargs)
        options = self.patches.follow(arguments.get("transformer_options"), share["patches"])
        arguments.put("transformer_options", {**options, calls.OVERRIDE: self.runner.override})
        args = tuple(arguments.args)
        result = self.runner.run(
            self.function,
            self.names,
            args,
            arguments.kwargs,
            mesh=mesh,
            step=heard(share["cache"]),
            comm=comm,
            graph=share["graph"] and not self.opened,  # a graph would replay copies of weights from where they no longer are
            whole=share["whole"],
        )
        return None if result is None else torch.cat([tensor.reshape(-1) for tensor in calls.tensors(result)])


def serve(channel: Channel, hello: dict[str, Any], leave: Callable[[], None]) -> None:
    """Work for rank 0 until it ends. ``hello``: device (the current one), rank, size of the group."""
    device = torch.device(hello["device"])
    if device.type != "cuda":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // hello["size"]))
    Worker(channel, ComfyHost(lambda sentence: channel.tell("said", sentence)), device, leave).serve()
