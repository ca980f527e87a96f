"""Rule `forecast`: its parts by themselves, and whole sampling runs against the rule written down plainly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity.inprocess import Job, error, load, noise, run, sample

from para_core.cache.forecast import CAUTION, FLOW, LINE, Forecast, Track, distance
from para_core.cache.predictor import History
from para_core.cache.rule import Decisions, Window
from para_core.settings import Cache, Parallel

pytestmark = pytest.mark.usefixtures("comfy")
FLUX, SMALL, WAN = Job("flux", (9, 14), steps=12), Job("flux_small", (9, 14), steps=12), Job("wan", (3, 6, 10), steps=12)
levels = st.floats(0.01, 1.0).map(lambda value: round(value, 3))


def learned(values: dict[float, torch.Tensor]) -> Any:
    forecast = Forecast()
    for sigma, value in values.items():
        forecast.learn("a", sigma, [value])
    return forecast.tracks["a"]


# -- the parts ----------------------------------------------------------------------------------------------------------


@given(four=st.lists(levels, min_size=4, max_size=4, unique=True).filter(lambda four: abs(four[1] - four[2]) > 0.05))
def test_of_what_is_linear_in_the_noise_level_the_known_share_is_foretold(four: list[float]) -> None:
    slope, start = noise(2, 5, 3, seed=1), noise(2, 5, 3, seed=2)
    track = learned({sigma: start + sigma * slope for sigma in four[:3]})
    assert track.measured.trust == pytest.approx(CAUTION, abs=1e-3)
    assert torch.allclose(track.foretell(four[3])[0], start + (four[2] + CAUTION * (four[3] - four[2])) * slope, atol=1e-3)


def test_trust_error_and_cost_follow_their_formulas() -> None:
    results = {sigma: noise(1, 4, 3, seed=seed) for seed, sigma in enumerate((0.9, 0.8, 0.6))}
    track = learned(results)
    line = results[0.8] + (0.6 - 0.8) * (results[0.8] - results[0.9]) / (0.8 - 0.9)
    ahead, came = line - results[0.8], results[0.6] - results[0.8]
    trust = CAUTION * min(1.0, max(0.0, float((ahead * came).sum() / (ahead * ahead).sum())))
    assert track.measured.trust == pytest.approx(trust, abs=1e-6)
    wrong = float((came - trust * ahead).abs().sum() / results[0.6].abs().sum())
    assert track.measured.bend == pytest.approx(wrong / (0.2 * 0.3), rel=1e-5)
    assert track.expected(0.5) == pytest.approx(track.measured.bend * 0.1 * 0.3, rel=1e-5)
    forecast = Forecast({"a": track})
    assert forecast.cost("a", 0.5, 0.25) == pytest.approx(25 * track.expected(0.5))


def test_a_line_that_led_astray_is_not_followed() -> None:
    value = noise(1, 4, 3)
    track = learned({0.9: 0 * value, 0.8: value, 0.7: 0 * value})
    assert track.measured.trust == 0 and torch.equal(track.foretell(0.6)[0], 0 * value)


def test_nothing_is_expected_of_what_is_unknown_or_was_computed() -> None:
    values = {sigma: noise(1, 4, 3, seed=seed) for seed, sigma in enumerate((0.9, 0.8, 0.6))}
    assert Forecast().cost("a", 0.5, 0.1) == math.inf
    assert learned({0.9: values[0.9], 0.8: values[0.8]}).expected(0.6) == math.inf, "two points give a line, and no error of it"
    track = learned(values)
    assert track.expected(0.6) == track.expected(0.8) == math.inf and track.expected(0.5) < math.inf


def test_the_distance_goes_to_the_next_lower_level_as_a_share_of_the_largest() -> None:
    assert distance(0.8, [1.0, 0.8, 0.5, 0.0], 1.0) == pytest.approx(0.3)
    assert distance(0.7, [1.0, 0.8, 0.5, 0.0], 2.0) == pytest.approx(0.1), "between two levels, as some samplers look"
    assert distance(0.7, [], 1.0) == pytest.approx(0.7)


# -- when the device is waited for ------------------------------------------------------------------------------------------


def call_of(keys: list[str], sigma: float, *, device: str = "cpu") -> Any:
    """A call for these conditions, one row each, with everything that `Forecaster` reads of one."""
    from para_core.comfy.calls import ModelCall
    from para_core.comfy.lanes import Call

    schedule = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    options = {"uuids": keys, "cond_or_uncond": [0] * len(keys), "sigmas": torch.tensor([sigma]), "sample_sigmas": schedule}
    latent = torch.empty(len(keys), 2, 3, device=device)
    return ModelCall(Call((latent,), {"transformer_options": options}), ["x"])


def forecaster(threshold: float, start: float = math.inf) -> Any:
    from para_core.comfy.forecasting import Forecaster

    return Forecaster(Decisions(Cache(threshold, rule="forecast"), Window(start)), FLOW, 1.0)


# a sampler's step: the conditions of each of its calls, its noise level, and what scales the noise in its results
steps = st.lists(
    st.tuples(st.sampled_from([[["a"]], [["b"]], [["a", "b"]], [["a"], ["b"]]]), st.sampled_from([1.0, 0.9, 0.8, 0.6, 0.45, 0.4, 0.2]),
              st.sampled_from([0.0, 0.01, 1.0])),
    min_size=4, max_size=14,
)  # fmt: skip


@settings(max_examples=60)
@given(run=steps, threshold=st.sampled_from([1e-30, 1.0, 30.0, 1e30]), start=st.sampled_from([1.0, 0.7]))
def test_numbers_that_are_read_late_decide_and_foretell_as_if_read_at_once(run: list[Any], threshold: float, start: float) -> None:
    late, at_once = (forecaster(threshold, start) for _ in range(2))
    at_once.forecast.learn = partial(learn_at_once, at_once.forecast)  # type: ignore[method-assign]
    for number, (calls, sigma, scale) in enumerate(run):
        answers = [one.answer(made) for one in (late, at_once) for made in [[call_of(keys, sigma) for keys in calls]]]
        assert (answers[0] is None) == (answers[1] is None)
        if answers[0] is not None:
            assert all(torch.equal(*pair) for pair in zip(*answers, strict=True))
            continue
        results = [sigma + scale * noise(len(keys), 2, 3, seed=number) for keys in calls]
        for one in (late, at_once):
            made = [call_of(keys, sigma) for keys in calls]
            one.learn(made, results)
    assert late.decisions.records == at_once.decisions.records
    assert late.decisions.conditions == at_once.decisions.conditions


def learn_at_once(forecast: Forecast, key: Any, sigma: float, results: list[torch.Tensor]) -> None:
    """Measured with numbers in the processor's hands, one condition's result."""
    track = forecast.tracks.setdefault(key, Track([History(LINE)]))
    (history,), result, span = track.histories, results[0].clone(), track.span(sigma)
    if span:
        last = history.points[-1][1]
        came, ahead = result - last, history.predict(sigma) - last
        trust = ((came * ahead).sum() / (ahead * ahead).sum()).nan_to_num(1.0).clamp(0, 1) * CAUTION
        wrong, whole = float((came - trust * ahead).abs().sum()), float(result.abs().sum())
        track.measured = SimpleNamespace(trust=float(trust), bend=wrong / whole / span if whole > 0 else math.inf)  # type: ignore[assignment]
    history.add(sigma, result)


def test_nothing_is_read_from_the_device_behind_a_forward() -> None:
    """A tensor of the device `meta` has no values: whoever reads one fails. Noise levels are read in front of the forward."""
    made = forecaster(1.0)
    for sigma in (1.0, 0.8, 0.6):
        calls = [call_of(["a"], sigma, device="meta"), call_of(["b"], sigma, device="meta")]
        assert made.answer(calls) is None
        for call in calls:
            call.options["sigmas"] = torch.empty(1, device="meta")
        made.learn(calls, [call.latents[0] for call in calls])
    assert [record.sigma for record in made.decisions.records] == pytest.approx([1.0, 0.8, 0.6])
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        made.answer([call_of(["a"], 0.4), call_of(["b"], 0.4)])


# -- whole runs ---------------------------------------------------------------------------------------------------------


@dataclass
class Known:
    """What the plain rule remembers of one condition."""

    points: list[tuple[float, torch.Tensor]] = field(default_factory=list)
    trust: float = 1.0
    bend: float | None = None
    spent: float = 0.0
    hits: int = 0


@dataclass
class Plain:
    """The rule around a stock model, with nothing of the pack."""

    threshold: float
    limit: int = -1
    records: list[list[Any]] = field(default_factory=list)
    known: dict[Any, Known] = field(default_factory=dict)

    def attach(self, patcher: Any) -> Any:
        from comfy.patcher_extension import WrappersMP

        patcher = patcher.clone()
        patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "plain_forecast", self.forward)
        return patcher

    def forward(self, executor: Callable, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        options = args[-1]
        sigma, keys = float(options["sigmas"].flatten()[0]), list(options["uuids"])
        lower = [float(level) for level in options["sample_sigmas"] if float(level) < sigma]
        known = [self.known.setdefault(key, Known()) for key in keys]
        totals = []
        for one in known:
            if one.bend is None or sigma in [level for level, _ in one.points]:
                totals = None
                break
            (s0, _), (s1, _) = one.points
            totals.append(one.spent + 100 * (sigma - max(lower)) * one.bend * abs(sigma - s0) * abs(sigma - s1))
        hit = bool(totals) and all(total < self.threshold for total in totals)
        hit = hit and all(self.limit < 0 or one.hits < self.limit for one in known)
        self.records.append([sigma, totals or [None] * len(keys), hit])
        if hit:
            for one, total in zip(known, totals, strict=True):
                one.spent, one.hits = total, one.hits + 1
            return torch.cat([self.guess(one, sigma, one.trust) for one in known])
        output = executor(x, *args, **kwargs)
        for one, result in zip(known, output.chunk(len(keys)), strict=True):
            one.spent, one.hits = 0.0, 0
            if len(one.points) == 2 and sigma not in [level for level, _ in one.points]:
                (s0, _), (s1, last) = one.points
                ahead, came = self.guess(one, sigma, 1.0) - last, result - last
                one.trust = CAUTION * min(1.0, max(0.0, float((ahead * came).sum() / (ahead * ahead).sum())))
                wrong = (result - self.guess(one, sigma, one.trust)).abs().sum() / result.abs().sum()
                one.bend = float(wrong) / (abs(sigma - s0) * abs(sigma - s1))
            one.points = [point for point in one.points if point[0] != sigma][-1:] + [(sigma, result.clone())]
        return output

    @staticmethod
    def guess(one: Known, sigma: float, trust: float) -> torch.Tensor:
        (s0, before), (s1, last) = one.points
        return last + trust * (sigma - s1) / (s1 - s0) * (last - before)


# name: job, threshold, limit of hits in a row, ranks
RUNS: dict[str, tuple[Job, float, int, Parallel]] = {
    "flux": (FLUX, 1.0, -1, Parallel(1)),
    "flux_cfg": (SMALL.but(cfg=5.0), 1.0, -1, Parallel(1)),
    "flux_heun_cfg_unequal_texts": (SMALL.but(sampler="heun", cfg=5.0, tokens=(11, 7)), 1.0, -1, Parallel(1)),
    "wan_dpm_2_limit": (WAN.but(sampler="dpm_2"), 1.0, 1, Parallel(1)),
    "flux_over_3": (FLUX, 1.0, -1, Parallel(3)),
    "flux_ring_of_3": (SMALL.but(size=(7, 5)), 1.0, -1, Parallel(3, ring_degree=3)),
    "flux_cfg_rows_on_2_ranks": (SMALL.but(cfg=5.0), 1.0, -1, Parallel(3, batch_degree=2)),
    "wan_cfg_over_3": (WAN.but(cfg=5.0), 1.0, -1, Parallel(3)),
}


@pytest.mark.parametrize("ranks, name", [(case[3].gpus, name) for name, case in RUNS.items()])
def test_decisions_costs_and_latent_equal_the_plain_rule(ranks: int, name: str) -> None:
    job, threshold, limit, parallel = RUNS[name]
    plain = Plain(threshold, limit)
    expected = sample(plain.attach(load(job.kind)), job)
    result, report = run(load(job.kind), job, Cache(threshold, max_consecutive_hits=limit, rule="forecast"), parallel)
    assert [hit for *_, hit in report["changes"]] == [hit for *_, hit in plain.records]
    assert 2 <= report["cached"] <= report["forwards"] - 2
    assert report["notes"] == [] and (report["ranks"] > 1) == (ranks > 1)
    for (_, costs, _), (_, others, _) in zip(report["changes"], plain.records, strict=True):
        assert [cost is None for cost in costs] == [cost is None for cost in others]
        finite = [[cost for cost in some if cost is not None] for some in (costs, others)]
        assert finite[0] == pytest.approx(finite[1], rel=2e-2, abs=1e-5)
    assert error(result, expected) < 1e-5 * report["forwards"]


NEVER = {"flux": FLUX.but(batch=2), "heun": SMALL.but(cfg=5.0, sampler="heun"), "wan": WAN.but(cfg=5.0, tokens=(11, 7))}


@pytest.mark.parametrize("job", NEVER.values(), ids=NEVER)
def test_a_threshold_that_never_hits_is_bit_identical(job: Job) -> None:
    result, report = run(load(job.kind), job, Cache(1e-9, rule="forecast"))
    assert torch.equal(result, sample(load(job.kind), job)) and report["cached"] == 0 < len(report["changes"])


def test_a_foretold_step_computes_nothing() -> None:
    model = load("flux_small")
    calls: list[int] = []
    handle = model.model.diffusion_model.img_in.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        _, report = run(model, SMALL, Cache(1.0, rule="forecast"))
    finally:
        handle.remove()
    assert len(calls) == report["forwards"] - report["cached"] < report["forwards"] == SMALL.steps


def test_a_model_without_a_plan_is_foretold_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    from para_core.comfy import session

    settings = Cache(5.0, rule="forecast")
    expected, report = run(load("flux_small"), SMALL, settings)
    monkeypatch.setattr(session, "plan_for", lambda _model: None)
    latent, blind = run(load("flux_small"), SMALL, settings)
    assert torch.equal(latent, expected) and blind["cached"] == report["cached"] > 0
