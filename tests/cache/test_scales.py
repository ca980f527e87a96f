"""Rule `forecast` is as careful with every kind of model: data whose best denoiser is known, sampled as each kind is."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from para_core.cache.presets import PRESETS
from para_core.cache.rule import Decisions, Window

pytestmark = pytest.mark.usefixtures("comfy")
SHAPE = (1, 4, 48, 48)
STEPS = 20
DEVIATION = 0.15  # of the data around each of four pictures
PICTURES = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1)).double()


def make(schedule: type, kind: type, **settings: Any) -> Any:
    """A ``model_sampling`` of these two of ComfyUI's classes."""
    return type("ModelSampling", (schedule, kind), {})(SimpleNamespace(sampling_settings=settings))


def denoised(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """The mean of all data that x = data + sigma * noise may come from."""
    spread = DEVIATION**2 + sigma**2
    share = torch.softmax(-((x - PICTURES) ** 2) / (2 * spread), 0)
    return (share * (PICTURES + DEVIATION**2 / spread * (x - PICTURES))).sum(0)


def as_flow(_sampling: Any, x: torch.Tensor, sigma: float) -> torch.Tensor:
    found = denoised(x / (1 - sigma), sigma / (1 - sigma)) if sigma < 1 else PICTURES.mean(0)
    return (x - found) / sigma


def as_noise(_sampling: Any, x: torch.Tensor, sigma: float) -> torch.Tensor:
    return (x - denoised(x, sigma)) / sigma


def as_velocity(sampling: Any, x: torch.Tensor, sigma: float) -> torch.Tensor:
    data = sampling.sigma_data
    return (x * data**2 / (sigma**2 + data**2) - denoised(x, sigma)) * math.hypot(sigma, data) / (sigma * data)


def as_edm(sampling: Any, x: torch.Tensor, sigma: float) -> torch.Tensor:
    return -as_velocity(sampling, x, sigma)


def as_cogvideox(_sampling: Any, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Its ``calculate_denoised`` solved for the model's result."""
    return (x / math.hypot(sigma, 1) - denoised(x, sigma)) * math.hypot(sigma, 1) / sigma


def as_cosmos(_sampling: Any, x: torch.Tensor, sigma: float) -> torch.Tensor:
    share = sigma / (1 + sigma)
    return (x * (1 - share) - denoised(x, sigma)) / share


def kinds() -> dict[str, tuple[Any, Callable[..., torch.Tensor]]]:
    import comfy.model_sampling as known
    from comfy.supported_models import CosmosT2V, SVD_img2vid

    discrete, edm = known.ModelSamplingDiscrete, known.ModelSamplingContinuousEDM
    return {
        "flow": (make(known.ModelSamplingDiscreteFlow, known.CONST, shift=3.0), as_flow),
        "noise": (make(discrete, known.EPS), as_noise),
        "velocity": (make(discrete, known.V_PREDICTION), as_velocity),
        "velocity, no signal at the end": (make(discrete, known.V_PREDICTION, zsnr=True), as_velocity),
        "velocity, video": (make(edm, known.V_PREDICTION, **SVD_img2vid.sampling_settings), as_velocity),
        "EDM": (make(edm, known.EDM, **CosmosT2V.sampling_settings), as_edm),
        "CogVideoX": (make(discrete, known.V_PREDICTION_DDPM, zsnr=True), as_cogvideox),
        "Cosmos": (make(known.ModelSamplingCosmosRFlow, known.COSMOS_RFLOW), as_cosmos),
    }


KINDS = (
    "flow", "noise", "velocity", "velocity, no signal at the end", "velocity, video", "EDM", "CogVideoX", "Cosmos",
)  # fmt: skip


def sampled(
    sampling: Any, output: Callable[..., torch.Tensor], sampler: str, scheduler: str, preset: str | None
) -> tuple[torch.Tensor, int]:
    """The latent, and how many steps were foretold."""
    import comfy.k_diffusion.sampling
    import comfy.samplers

    from para_core.comfy.calls import Evaluation, ModelCall
    from para_core.comfy.forecasting import Forecaster, scale
    from para_core.comfy.lanes import Call

    sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, STEPS)
    own, evaluation, hits = None, Evaluation(), 0
    if preset is not None:
        window = Window(float(sampling.percent_to_sigma(PRESETS[preset].start_percent)))
        own = Forecaster(Decisions(PRESETS[preset], window), scale(sampling), float(sampling.sigma_max))

    def model(x: torch.Tensor, sigma: torch.Tensor, **_extra: Any) -> torch.Tensor:
        nonlocal hits
        options = {"uuids": ["a"], "cond_or_uncond": [0], "sigmas": sigma, "sample_sigmas": sigmas}
        call = ModelCall(Call((x,), {"transformer_options": options}), ["x"])
        evaluation.count([call])
        found = own.answer([call]) if own is not None else None
        if found is None:
            found = [output(sampling, x.double(), float(sigma[0])).float()]
            if own is not None:
                own.learn([call], found)
        else:
            hits += 1
        return sampling.calculate_denoised(sigma, found[0], x)

    # what samplers ask that count in signal-to-noise ratios
    model.inner_model = SimpleNamespace(model_patcher=SimpleNamespace(get_model_object=lambda _name: sampling))  # type: ignore[attr-defined]
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))
    x = sampling.noise_scaling(sigmas[0], noise, torch.zeros(SHAPE), True)
    return getattr(comfy.k_diffusion.sampling, f"sample_{sampler}")(model, x, sigmas, disable=True), hits


@pytest.mark.parametrize(
    ("sampler", "scheduler"), [("euler", "normal"), ("euler", "simple"), ("dpmpp_2m", "karras"), ("exp_heun_2_x0", "karras")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_foretold_steps_leave_an_error_like_that_of_flow_matching(kind: str, sampler: str, scheduler: str) -> None:
    sampling, output = kinds()[kind]
    exact, none = sampled(sampling, output, sampler, scheduler, None)
    latent, hits = sampled(sampling, output, sampler, scheduler, "balanced")
    error = float((latent - exact).norm() / exact.norm())
    print(f"{kind}, {sampler}, {scheduler}: {hits} of {STEPS} foretold, error {error:.1%}")
    assert not none and hits >= 1 and error < 0.08


@pytest.mark.parametrize("sigma", [0.1, 0.9, 3.0, 50.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_how_far_a_result_moves_the_latent_of_every_kind(kind: str, sigma: float) -> None:
    """Of x / (1 + sigma), along the share of noise in it: by what ComfyUI's own ``calculate_denoised`` makes of a result."""
    from para_core.comfy.forecasting import scale

    sampling, _ = kinds()[kind]
    own = scale(sampling)
    sigma = sigma / 100 if kind == "flow" else sigma
    x, result = torch.zeros(1, 1, 1, 1).double(), torch.ones(1, 1, 1, 1).double()
    denoised = float(sampling.calculate_denoised(torch.tensor([sigma]).double(), result, x))
    direction = -denoised / sigma  # dx / dsigma = (x - denoised) / sigma
    shrinks = 1.0 if kind == "flow" else (1 + sigma) ** 2 / (1 + sigma)  # dsigma / du, and what the latent is divided by
    assert own.weight(sigma) == pytest.approx(abs(direction) * shrinks, rel=1e-6)
    assert own.level(sigma) == pytest.approx(sigma if kind == "flow" else sigma / (1 + sigma))


@pytest.mark.parametrize(
    ("name", "noisy"), [("euler", False), ("euler_ancestral", True), ("dpmpp_2m_sde_gpu", True), ("uni_pc", False), ("dpm_fast", False)]
)
def test_with_samplers_that_add_noise_no_step_is_foretold(name: str, noisy: bool) -> None:
    from comfy.samplers import sampler_object

    from para_core.comfy.forecasting import foreseen

    found = foreseen(kinds()["flow"][0], sampler_object(name))
    assert isinstance(found, str) is noisy and (not noisy or name in found)


def test_models_that_give_something_else_are_declined() -> None:
    import comfy.model_sampling as known

    from para_core.comfy.forecasting import scale

    for other in (known.X0, known.IMG_TO_IMG):
        assert scale(make(known.ModelSamplingDiscrete, other)) is None
    assert scale(make(known.ModelSamplingDiscreteFlow, known.IMG_TO_IMG_FLOW)) is None
    assert all(scale(sampling) is not None for sampling, _ in kinds().values())
