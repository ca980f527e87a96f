"""Whole sampling runs with the cache: every decision, every measured change and the latent equal the plain reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache.reference import Reference
from parity import inprocess
from parity.inprocess import Job, error, load, noise, run, sample

from para_core.settings import Cache, Parallel

pytestmark = pytest.mark.usefixtures("comfy")
TOLERANCE = 1e-5  # relative, per forward, float32
MARGIN = 1e-3  # changes are compared to this, relative; no change may be nearer than this to the threshold

FLUX, SMALL, WAN = Job("flux", (9, 14), steps=10), Job("flux_small", (9, 14), steps=10), Job("wan", (3, 6, 10), steps=10)
UNEQUAL = {"cfg": 5.0, "tokens": (11, 7)}


def compare(report: dict[str, Any], reference: Reference) -> None:
    """The run line says what the reference did."""
    assert report["notes"] == []
    assert [hit for *_, hit in report["changes"]] == [hit for *_, hit in reference.records]
    for (sigma, changes, _), (expected_sigma, expected, _) in zip(report["changes"], reference.records, strict=True):
        assert sigma == pytest.approx(expected_sigma, rel=1e-6)
        assert [change is None for change in changes] == [change is None for change in expected]
        known = [change for change in expected if change is not None]
        assert [change for change in changes if change is not None] == pytest.approx(known, rel=MARGIN)
        for change in known:
            assert abs(change - reference.threshold) > MARGIN * reference.threshold, "choose another threshold: this one is too close"


def check(model: Any, job: Job, reference: Reference, *settings: Any, **options: Any) -> dict[str, Any]:
    expected = sample(reference.attach(model), job, **options)
    result, report = run(model, job, *settings, **options)
    compare(report, reference)
    assert error(result, expected) < TOLERANCE * report["forwards"]
    return report


def mixed(report: dict[str, Any]) -> None:
    """Some forwards hit and some did not: otherwise the comparison says little."""
    assert 2 <= report["cached"] <= report["forwards"] - 2


# name: job, threshold, predictor, settings beside the cache's, whether the conditions of a step are decided together
RUNS: dict[str, tuple[Job, float, str, Parallel, bool]] = {
    "flux": (FLUX, 0.1, "reuse", Parallel(1), False),
    "flux_taylor": (SMALL, 0.15, "taylor", Parallel(1), False),
    "flux_cfg": (FLUX.but(cfg=5.0), 0.15, "reuse", Parallel(1), False),
    "flux_cfg_unequal_texts": (SMALL.but(**UNEQUAL), 0.2, "taylor", Parallel(1), False),
    "flux_heun_taylor": (SMALL.but(sampler="heun", cfg=5.0), 0.2, "taylor", Parallel(1), False),
    "flux_batch_of_2_cfg": (SMALL.but(cfg=5.0, batch=2), 0.2, "reuse", Parallel(1), False),
    "wan": (WAN, 0.1, "reuse", Parallel(1), False),
    "wan_cfg_taylor": (WAN.but(cfg=5.0), 0.1, "taylor", Parallel(1), False),
    "wan_cfg_unequal_texts": (WAN.but(**UNEQUAL), 0.1, "reuse", Parallel(1), False),
    "flux_over_3": (FLUX, 0.1, "reuse", Parallel(3), False),
    "flux_ring_of_3_taylor": (SMALL.but(size=(7, 5)), 0.2, "taylor", Parallel(3, ring_degree=3), False),
    "flux_cfg_over_3": (FLUX.but(cfg=5.0), 0.15, "reuse", Parallel(3), False),
    "flux_cfg_unequal_texts_over_3": (SMALL.but(**UNEQUAL), 0.2, "reuse", Parallel(3), False),
    "flux_cfg_rows_on_2_ranks": (SMALL.but(cfg=5.0), 0.2, "taylor", Parallel(3, batch_degree=2), False),
    "flux_cfg_lanes_on_2_ranks": (FLUX.but(**UNEQUAL), 0.15, "reuse", Parallel(3, batch_degree=2), True),
    "flux_images_on_3_ranks": (SMALL.but(batch=5), 0.15, "reuse", Parallel(3), False),
    "flux_cfg_images_on_3_ranks": (FLUX.but(batch=2, cfg=5.0), 0.15, "reuse", Parallel(3, batch_degree=3), False),
    "wan_cfg_over_3": (WAN.but(cfg=5.0), 0.1, "taylor", Parallel(3), False),
    "wan_cfg_lanes_on_2_ranks": (WAN.but(**UNEQUAL), 0.1, "taylor", Parallel(3, batch_degree=2), True),
}


@pytest.mark.parametrize("ranks, name", [(case[3].gpus, name) for name, case in RUNS.items()])
def test_decisions_changes_and_latent_equal_the_reference(ranks: int, name: str) -> None:
    job, threshold, predictor, parallel, joint = RUNS[name]
    reference = Reference(threshold, taylor=predictor == "taylor", joint=joint)
    report = check(load(job.kind), job, reference, Cache(threshold, predictor=predictor), parallel)
    mixed(report)
    assert report["ranks"] == (ranks if parallel.batch_degree != 2 else 2)


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("ranks, job", [(1, WAN), (3, WAN.but(cfg=5.0))], ids=["1", "3_cfg"])
def test_no_more_consecutive_hits_than_allowed(ranks: int, job: Job, limit: int) -> None:
    report = check(load("wan"), job, Reference(0.2, limit=limit), Cache(0.2, max_consecutive_hits=limit), Parallel(ranks))
    hits = "".join("x" if hit else "." for *_, hit in report["changes"])
    assert "x" * limit in hits and "x" * (limit + 1) not in hits


def test_without_a_limit_more_of_them_follow_each_other() -> None:
    _, report = run(load("wan"), WAN, Cache(0.2))
    assert "xxx" in "".join("x" if hit else "." for *_, hit in report["changes"])


@pytest.mark.parametrize("start, end", [(0.3, 1.0), (0.0, 0.4), (0.2, 0.6)])
@pytest.mark.parametrize("kind", ["flux_small", "wan"])
def test_hits_only_between_start_and_end_percent(kind: str, start: float, end: float) -> None:
    model, job = load(kind), {"flux_small": SMALL, "wan": WAN}[kind]
    first, last = (float(model.get_model_object("model_sampling").percent_to_sigma(percent)) for percent in (start, end))
    report = check(model, job, Reference(0.2, first, last), Cache(0.2, start, end))
    sigmas = [sigma for sigma, _, hit in report["changes"] if hit]
    assert sigmas and all(last <= sigma <= first for sigma in sigmas)
    _, free = run(model, job, Cache(0.2))
    assert [sigma for sigma, _, hit in free["changes"] if hit and not last <= sigma <= first], "the window kept some from being hits"


@pytest.mark.parametrize("off", [Cache(threshold=0.0), Cache(threshold=0.5, max_consecutive_hits=0)], ids=["threshold_0", "limit_0"])
def test_a_cache_that_is_off_leaves_stock_alone(off: Cache) -> None:
    model = load("flux")
    with inprocess.reports() as lines:
        result = sample(inprocess.attached(model, off), FLUX)
    assert torch.equal(result, sample(model, FLUX)) and lines == []


@pytest.mark.parametrize("predictor", ["reuse", "taylor"])
@pytest.mark.parametrize(
    "job", [FLUX.but(batch=2), SMALL.but(**UNEQUAL), WAN.but(cfg=5.0), WAN.but(sampler="heun")], ids=["flux", "unequal", "wan", "heun"]
)
def test_a_threshold_that_never_hits_is_bit_identical(job: Job, predictor: str) -> None:
    model = load(job.kind)
    result, report = run(model, job, Cache(threshold=1e-9, predictor=predictor))
    assert torch.equal(result, sample(model, job)) and report["cached"] == 0 < len(report["changes"])


# -- fresh runs -------------------------------------------------------------------------------------------------------

PASSES = [SMALL, SMALL.but(seed=7, denoise=0.6), SMALL.but(size=(14, 21), denoise=0.6), SMALL.but(batch=2), SMALL.but(cfg=5.0), SMALL]


@pytest.mark.parametrize("ranks", [1, 3])
def test_runs_after_other_runs_decide_as_if_alone(ranks: int) -> None:
    """A second sampler, a hires pass, another batch size and another cfg, all with one patched model."""
    patched = inprocess.attached(load("flux_small"), Cache(0.2), Parallel(ranks))
    with inprocess.reports() as lines:
        results = [sample(patched, job) for job in PASSES]
    for job, result, report in zip(PASSES, results, lines, strict=True):
        reference = Reference(0.2)
        assert error(result, sample(reference.attach(load("flux_small")), job)) < TOLERANCE * job.steps
        compare(report, reference)
        assert report["ranks"] == ranks
    assert torch.equal(results[0], results[-1]) and lines[0]["changes"] == lines[-1]["changes"]


@pytest.mark.parametrize("ranks", [1, 3])
def test_two_models_in_turn_keep_their_caches_apart(ranks: int) -> None:
    for kind, job in (("flux", FLUX), ("wan", WAN), ("flux", FLUX.but(cfg=5.0))):
        check(load(kind), job, Reference(0.12), Cache(0.12), Parallel(ranks))


# -- how ComfyUI runs conditions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["one by one", "turn about"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_state_is_kept_by_condition_whether_batched_or_not(monkeypatch, ranks: int, pattern: str) -> None:
    model, job, threshold = load("flux_small"), SMALL.but(cfg=5.0), 0.2
    base = model.model
    room, scarce = base.memory_required, lambda *_args, **_kwargs: float("inf")
    first = scarce if pattern == "one by one" else room

    def callback(step: int, *_: Any) -> None:
        if pattern == "turn about":
            monkeypatch.setattr(base, "memory_required", room if step % 2 else scarce)

    reports = []
    for sampler in ("reference", "pack"):
        monkeypatch.setattr(base, "memory_required", first)
        if sampler == "reference":
            reference = Reference(threshold)
            expected = sample(reference.attach(model), job, callback=callback)
        else:
            result, report = run(model, job, Cache(threshold), Parallel(ranks), callback=callback)
            reports.append(report)
    sizes = {len(changes) for _, changes, _ in reports[0]["changes"]}
    assert sizes == ({1} if pattern == "one by one" else {1, 2}), "conditions ran as wanted"
    compare(reports[0], reference)
    mixed(reports[0])
    assert error(result, expected) < TOLERANCE * reports[0]["forwards"]


def reversed_on_odd_steps(model: Any) -> Any:
    """A clone that has ComfyUI calculate conditions in the other order on every second step."""
    import comfy.samplers

    model = model.clone()
    steps: dict[float, int] = {}

    def calculate(args: dict[str, Any]) -> list[torch.Tensor]:
        number = steps.setdefault(float(args["sigma"].flatten()[0]), len(steps))
        turn = -1 if number % 2 else 1
        rest = (args["model"], args["conds"][::turn], args["input"], args["sigma"], args["model_options"])
        return comfy.samplers.calc_cond_batch(*rest)[::turn]

    model.set_model_sampler_calc_cond_batch_function(calculate)
    return model


@pytest.mark.parametrize("unequal", [False, True], ids=["batched", "one_by_one"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_state_is_kept_by_condition_in_whichever_order_they_come(ranks: int, unequal: bool) -> None:
    job = SMALL.but(**UNEQUAL) if unequal else SMALL.but(cfg=5.0)
    report = check(reversed_on_odd_steps(load("flux_small")), job, Reference(0.2), Cache(0.2), Parallel(ranks))
    mixed(report)


@pytest.mark.parametrize("unequal", [False, True], ids=["rows", "lanes"])
@pytest.mark.parametrize("ranks", [2])
def test_conditions_that_change_places_under_the_batch_split_start_cold(ranks: int, unequal: bool) -> None:
    """What one rank remembers of a condition is of no use to another, so nothing is reused, and nothing goes wrong."""
    model, job = reversed_on_odd_steps(load("flux_small")), SMALL.but(**UNEQUAL) if unequal else SMALL.but(cfg=5.0)
    result, report = run(model, job, Cache(0.9), Parallel(ranks, batch_degree=2))
    assert report["notes"] == [] and report["degrees"] == [2, 1, 1] and report["cached"] == 0
    assert error(result, sample(load("flux_small"), job)) < TOLERANCE * report["forwards"]


# -- what other code does to a run ------------------------------------------------------------------------------------


def smaller_from(model: Any, sigma: float) -> Any:
    """A clone whose model sees a smaller latent while the noise level is under `sigma`, as foreign wrappers may do."""

    def wrapper(apply: Any, args: dict[str, Any]) -> torch.Tensor:
        x = args["input"]
        if float(args["timestep"].flatten()[0]) >= sigma:
            return apply(x, args["timestep"], **args["c"])
        small = torch.nn.functional.interpolate(x, size=(7, 10))
        return torch.nn.functional.interpolate(apply(small, args["timestep"], **args["c"]), size=x.shape[-2:])

    model = model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return model


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_shape_that_changes_in_mid_run_starts_cold(ranks: int) -> None:
    report = check(smaller_from(load("flux_small"), 0.8), SMALL, Reference(0.2), Cache(0.2), Parallel(ranks))
    cold = [index for index, (_, changes, _) in enumerate(report["changes"]) if changes == [None]]
    assert len(cold) == 2 and cold[0] == 0
    assert any(hit for *_, hit in report["changes"][cold[1] :]), "and hits again later"


def control(strength: float) -> dict[str, Any]:
    import comfy.controlnet

    class FixedControl(comfy.controlnet.ControlBase):
        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            rows = -(-x_noisy.shape[-2] // 2) * -(-x_noisy.shape[-1] // 2)
            residual = [strength * noise(x_noisy.shape[0], rows, 128, seed=seed) for seed in range(4)]
            return {"input": residual[:2], "output": [None, residual[2], None, residual[3]]}

    return {"control": FixedControl()}


@pytest.mark.parametrize("ranks, cfg, threshold", [(1, 1.0, 0.2), (1, 5.0, 0.25), (3, 1.0, 0.2)])
def test_control_residuals_are_not_counted_twice_on_a_hit(ranks: int, cfg: float, threshold: float) -> None:
    model, job = load("flux_small"), SMALL.but(cfg=cfg)
    extra = control(0.5)
    report = check(model, job, Reference(threshold), Cache(threshold), Parallel(ranks), extra=extra)
    mixed(report)
    assert error(sample(model, job, extra=extra), sample(model, job)) > 1e-2


@pytest.mark.parametrize("ranks", [1, 3])
def test_reference_latents_are_part_of_the_compared_stream(ranks: int) -> None:
    extra = {"reference_latents": [noise(1, 16, 6, 5, seed=9)]}
    mixed(check(load("flux_small"), SMALL, Reference(0.2), Cache(0.2), Parallel(ranks), extra=extra))


def skip_layers(model: Any, double: str, single: str = "") -> Any:
    """What the stock node SkipLayerGuidanceDiT returns, active for the whole run."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    return SkipLayerGuidanceDiT.execute(model, 2.0, 0.0, 1.0, double, single).args[0]


SKIPS = [("1", ""), ("0", ""), ("0, 1", ""), ("", "1, 2"), ("", "3"), ("0", "3"), ("0, 1", "0, 1, 2, 3")]


@pytest.mark.parametrize("double, single", SKIPS)
def test_foreign_patches_that_skip_blocks_run_and_never_mix_with_the_unskipped_forward(double: str, single: str) -> None:
    model, job = skip_layers(load("flux_small"), double, single), SMALL.but(cfg=5.0)
    expected = sample(model, job)
    result, report = run(model, job, Cache(threshold=1e-9))
    assert torch.equal(result, expected), "never hitting changes nothing"
    assert report["forwards"] == 2 * job.steps
    result, report = run(model, job, Cache(threshold=0.2))
    assert result.isfinite().all() and error(result, expected) < 0.2
    unskipped = [record for record in report["changes"] if len(record[1]) == 2]
    assert len(unskipped) == job.steps
    assert [changes == [None, None] for _, changes, _ in unskipped] == [True] + [False] * (job.steps - 1)
    assert any(hit for *_, hit in unskipped)
    skipped = [record for record in report["changes"] if len(record[1]) == 1]
    assert len(skipped) == job.steps and skipped[0][1:] == [[None], False], "it has a state of its own"
    if double.startswith("0") or single.endswith("3"):
        assert all(record[1:] == [[None], False] for record in skipped), "without its first or last block it is never reused"


@pytest.mark.parametrize("kind, job", [("wan", WAN)])
def test_skipped_blocks_of_wan_run_too(kind: str, job: Job) -> None:
    for layers in ("0", "3", "1, 2", "0, 1, 2, 3"):
        model = skip_layers(load(kind), layers)
        result, _ = run(model, job, Cache(threshold=1e-9))
        assert torch.equal(result, sample(model, job))
