"""Conditions that are asked for more than once in a step: each time has a memory of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity.inprocess import Job, error, load, run, sample

from para_core.settings import Cache, Parallel

pytestmark = pytest.mark.usefixtures("comfy")
TOLERANCE = 1e-5  # relative, per forward, float32
SMALL = Job("flux_small", (8, 12), steps=10)
RULES = {"classic": Cache(0.2), "forecast": Cache(2.0, rule="forecast")}


def looks_again(model: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A clone that computes the prompt a second time in every step, for a changed latent, as Self-Attention Guidance does."""
    import comfy.samplers

    def post_cfg(args: dict[str, Any]) -> torch.Tensor:
        again = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], change(args["input"]), args["sigma"], args["model_options"])
        assert again[0].isfinite().all()
        return args["denoised"]

    model = model.clone()
    model.set_model_sampler_post_cfg_function(post_cfg)
    return model


def in_tiles(model: Any) -> Any:
    """A clone whose model sees the left and the right half of every latent one after the other."""

    def wrapper(apply: Any, args: dict[str, Any]) -> torch.Tensor:
        halves = args["input"].chunk(2, dim=3)
        return torch.cat([apply(half, args["timestep"], **args["c"]) for half in halves], dim=3)

    model = model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return model


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_a_second_look_with_another_latent_changes_nothing_of_what_is_cached(rule: str, ranks: int) -> None:
    model, settings = load("flux_small"), (RULES[rule], Parallel(ranks))
    expected, alone = run(model, SMALL, *settings)
    result, report = run(looks_again(model, lambda latent: latent.flip(2) * 1.01), SMALL, *settings)
    assert alone["cached"] >= 2 and torch.equal(result, expected)
    assert report["changes"][::2] == alone["changes"] and report["forwards"] == 2 * alone["forwards"]


@pytest.mark.parametrize("rule", RULES)
def test_tiles_are_not_taken_for_each_other(rule: str) -> None:
    """Each half is cached as if it were a picture of its own."""
    model = load("flux_small")
    _, report = run(in_tiles(model), SMALL, RULES[rule])
    left, right = report["changes"][::2], report["changes"][1::2]
    assert left[0][1] == right[0][1] == [None] and report["cached"] >= 2
    assert all(not hit for *_, hit in (left[0], right[0]))


def test_a_sampler_that_writes_all_levels_into_one_tensor_is_cached_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy.k_diffusion import sampling

    def euler(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict, callback: Any, disable: bool, one: bool) -> torch.Tensor:
        level = x.new_empty(len(x))
        for index, (sigma, after) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
            denoised = model(x, level.fill_(sigma) if one else sigma * x.new_ones(len(x)), **extra_args)
            callback({"x": x, "i": index, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
            x = x + (x - denoised) / sigma * (after - sigma)
        return x

    found = []
    for one in (False, True):
        monkeypatch.setattr(sampling, "sample_euler", lambda *args, one=one, **kwargs: euler(*args, **kwargs, one=one))
        found.append(run(load("flux_small"), SMALL, RULES["classic"], callback=lambda *_: None))
    (expected, _), (result, report) = found
    assert report["cached"] >= 2 and torch.equal(result, expected)


def test_a_sampler_that_evaluates_twice_at_one_level_asks_for_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy.k_diffusion import sampling

    def twice(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict, **_: Any) -> torch.Tensor:
        for sigma, after in zip(sigmas, sigmas[1:], strict=False):
            for _ in range(2):
                denoised = model(x, sigma * x.new_ones(len(x)), **extra_args)
            x = x + (x - denoised) / sigma * (after - sigma)
        return x

    monkeypatch.setattr(sampling, "sample_euler", twice)
    _, report = run(load("flux_small"), SMALL, Cache(1e-9))
    assert [None in changes for _, changes, _ in report["changes"]] == [True, *[False] * (2 * SMALL.steps - 1)]


class Regional(Job):
    """The prompt has an area of its own beside the whole picture."""

    def conditioning(self, seed: int, tokens: int, **extra: Any) -> list:
        whole = super().conditioning(seed, tokens, **extra)
        area = {"area": (8, 6, 0, 3), "strength": 1.0}
        return whole if seed == 12 else [*whole, *super().conditioning(seed + 1, tokens, **extra, **area)]


@pytest.mark.parametrize("tokens, forwards", [((11, 7), 4), ((11, 11), 2)], ids=["apart", "in one call"])
@pytest.mark.parametrize("ranks, threshold", [(1, 1e-9), (1, 1e9), (2, 1e-9)])
def test_an_area_and_the_negative_prompt_s_copy_of_it_are_not_taken_for_each_other(
    ranks: int, threshold: float, tokens: tuple[int, int], forwards: int
) -> None:
    """ComfyUI computes both under one uuid: texts of unequal lengths by themselves, others together."""
    job = Regional("flux_small", (8, 12), cfg=5.0, tokens=tokens, steps=4)
    result, report = run(load("flux_small"), job, Cache(threshold), Parallel(ranks))
    if threshold < 1:
        assert error(result, sample(load("flux_small"), job)) < TOLERANCE * report["forwards"]
    assert report["forwards"] == forwards * job.steps or ranks > 1
    unknown = [changes for _, changes, _ in report["changes"] if None in changes]
    assert sum(map(len, unknown)) == 4, "after the first step each of the four is compared with itself"


@pytest.mark.parametrize("rule", RULES)
def test_rows_that_are_no_multiple_of_the_conditions_are_skipped_and_computed_together(rule: str) -> None:
    """A wrapper that leaves the negative prompt out from the fourth step on: three rows, said to be of two conditions."""

    def without_negative(model: Any) -> Any:
        calls = 0

        def wrapper(apply: Any, args: dict[str, Any]) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls < 4:
                return apply(args["input"], args["timestep"], **args["c"])
            half = {name: value[:3] if isinstance(value, torch.Tensor) else value for name, value in args["c"].items()}
            result = apply(args["input"][:3], args["timestep"][:3], **half)
            return torch.cat([result, result])

        model = model.clone()
        model.set_model_unet_function_wrapper(wrapper)
        return model

    job = SMALL.but(batch=3, cfg=3.0)
    expected = sample(without_negative(load("flux_small")), job)
    result, report = run(without_negative(load("flux_small")), job, RULES[rule])
    assert report["cached"] >= 1 and error(result, expected) < 0.05
    assert [len(changes) for _, changes, _ in report["changes"]] == [2] * 3 + [1] * 7


@pytest.mark.parametrize("rule", RULES)
def test_a_scheduled_lora_is_seen_where_it_sets_in(rule: str) -> None:
    """As nodes that hang a LoRA with keyframes on a prompt do."""
    import comfy.hooks
    import comfy.utils
    from env.prepare import Environment
    from parity.inprocess import LORAS

    file = Environment.locate().models / "loras" / LORAS["flux"]
    hooks = comfy.hooks.create_hook_lora(comfy.utils.load_torch_file(str(file), safe_load=True), strength_model=1.0, strength_clip=0.0)
    schedule = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((0.0, 0.0), (1.0, 0.5)):
        schedule.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    hooks.set_keyframes_on_hooks(schedule)
    job = Job("flux", (8, 12), steps=12)
    _, report = run(load("flux"), job, Cache(1e9, rule=rule), extra={"hooks": hooks})
    cold = [index for index, (_, changes, _) in enumerate(report["changes"]) if None in changes]
    first = 1 if rule == "classic" else 3  # steps that must be computed before one can be skipped
    assert len(cold) == 2 * first and cold[0] == 0 and cold[first] > first and report["cached"] == job.steps - 2 * first
