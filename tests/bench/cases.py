"""Models of real size with random weights, of ComfyUI's own classes, and one sampling run of them."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import comfy.memory_management
import comfy.model_base
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.sd
import torch
import turns
import weights_file
from clock import between, mark
from parity.inprocess import reports
from sizes import Case

WARM = 3
"""First steps of a run that do not count: blocks are compiled in the first, kernels timed after it, and a graph is captured in
the third, because new times make the second like a first."""


def dtype() -> torch.dtype:
    return torch.bfloat16 if comfy.model_management.get_torch_device().type == "cuda" else torch.float32


def base_model(case: Case, device: torch.device) -> comfy.model_base.BaseModel:
    config = comfy.model_detection.model_config_from_unet_config(case.config)
    config.set_inference_dtype(dtype(), None)
    return config.get_model({}, "", device=device)


def build(case: Case) -> comfy.model_patcher.ModelPatcher:
    """A model of ComfyUI's own classes with random weights, made on its device."""
    device = comfy.model_management.get_torch_device()
    model = base_model(case, device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.diffusion_model.parameters():
        parameter.data.normal_(std=0.02, generator=generator)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


def from_file(name: str, case: Case, folder: Path) -> comfy.model_patcher.ModelPatcher:
    """The same as Load Diffusion Model opens it; the file is written first where it is not in ``folder`` yet."""
    path = folder / f"{name.partition('-')[0]}.safetensors"
    if not path.exists() and comfy.memory_management.aimdo_enabled:
        weights_file.make(name, path)
    elif not path.exists():
        weights_file.write(case, path)
    return comfy.sd.load_diffusion_model(str(path))


@dataclass(frozen=True)
class Run:
    """Latents float32, the seconds of each step after the warm ones but the last, and those until the last one's forward returned.

    ``peak``: the most bytes in use on the card meanwhile. ``report``: what the pack's own line said of the run, {} for stock.
    ``disturbed``: others of ``turns`` did not make way.
    """

    latents: torch.Tensor
    seconds: list[float]
    launch: float
    peak: int
    report: dict
    disturbed: bool = False

    @property
    def step(self) -> float:
        return statistics.median(self.seconds)


def sample(
    model: comfy.model_patcher.ModelPatcher, case: Case, *, steps: int = 0, watch: Callable[[int], None] = lambda _step: None
) -> Run:
    """Sample with ComfyUI's own function. Nobody waits for the device between steps, as in ComfyUI: it tells the time itself.

    Only before the last step the device has nothing left to do: that step is not timed, its forward is launched unhindered.
    ``watch`` is told the number of every step that has been launched. From the last warm step on this process has the machine to
    itself, see ``turns``.
    """
    generator = torch.Generator().manual_seed(1)
    context = torch.randn(1, *case.text, generator=generator)
    extra = {"pooled_output": torch.randn(1, case.pooled, generator=generator)} if case.pooled else {}
    noise, steps = torch.randn(case.latent, generator=generator), steps or case.steps
    cuda = torch.cuda.is_available()
    marks: list[torch.cuda.Event | float] = []
    held = turns.joined.disturbed if turns.joined is not None else 0

    def step(*_args) -> None:
        if turns.joined is not None and len(marks) == WARM - 2:
            if cuda:
                torch.cuda.synchronize()
            timed.enter_context(turns.alone())
        marks.append(mark())
        if cuda and len(marks) == WARM:
            torch.cuda.reset_peak_memory_stats()
        if cuda and len(marks) == steps - 1:
            torch.cuda.synchronize()
        watch(len(marks) - 1)

    with torch.inference_mode(), launching() as launches, reports() as lines, ExitStack() as timed:
        latents = comfy.sample.sample(
            model, noise, steps, 1.0, "euler", "simple", [[context, extra]], [[context, extra]], torch.zeros(case.latent),
            disable_pbar=True, callback=step, seed=1,
        )  # fmt: skip
        latents = latents.float().cpu()
    seconds = [between(before, after) for before, after in itertools.pairwise(marks)]
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    disturbed = turns.joined is not None and turns.joined.disturbed > held
    return Run(latents, seconds[WARM - 1 : -1], launches[-1], peak, lines[-1] if lines else {}, disturbed)


@contextmanager
def launching() -> Iterator[list[float]]:
    """Seconds until each forward has returned: nobody waits for the device, unless the forward itself does.

    Of whichever model runs: where blocks are compiled under dynamic VRAM, that is a copy of the one that was asked for.
    """
    original, found = comfy.model_base.BaseModel.apply_model, []

    def apply_model(*args, **kwargs):
        start = time.perf_counter()
        result = original(*args, **kwargs)
        found.append(time.perf_counter() - start)
        return result

    comfy.model_base.BaseModel.apply_model = apply_model
    try:
        yield found
    finally:
        comfy.model_base.BaseModel.apply_model = original
