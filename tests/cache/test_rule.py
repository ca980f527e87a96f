"""The parts of the rule by themselves: the formula of each predictor, the decision, and what starts cold."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity.inprocess import Job, load, noise, run

from para_core.cache.predictor import ORDERS, History
from para_core.cache.rule import RULES, Condition, Decisions, Window, change, decide
from para_core.settings import Cache

levels = st.floats(0.01, 1.0).map(lambda value: round(value, 3))


@given(sigmas=st.tuples(levels, levels, levels).filter(lambda three: abs(three[0] - three[1]) > 0.05))
def test_taylor_is_exact_for_residuals_that_are_linear_in_the_noise_level(sigmas: tuple[float, float, float]) -> None:
    slope, start = noise(2, 5, 3, seed=1).double(), noise(2, 5, 3, seed=2).double()
    history = History(ORDERS["taylor"])
    for sigma in sigmas[:2]:
        history.add(sigma, (start + sigma * slope).float())
    expected = start + sigmas[2] * slope
    assert torch.allclose(history.predict(sigmas[2]).double(), expected, atol=2e-5)


def test_taylor_follows_its_documented_formula_over_the_last_two_computed_points() -> None:
    r = [noise(1, 4, 3, seed=seed) for seed in range(3)]
    history = History(ORDERS["taylor"])
    for sigma, residual in zip((0.9, 0.8, 0.6), r, strict=True):
        history.add(sigma, residual)
    expected = r[2] + (0.5 - 0.6) * (r[2] - r[1]) / (0.6 - 0.8)
    assert torch.allclose(history.predict(0.5), expected, atol=1e-6)


def test_reuse_and_taylor_with_one_known_point_give_the_last_residual_back() -> None:
    residual = noise(1, 4, 3)
    for order in ORDERS.values():
        history = History(order)
        history.add(0.9, residual)
        assert torch.equal(history.predict(0.5), residual)
    reuse = History(ORDERS["reuse"])
    reuse.add(0.9, noise(1, 4, 3, seed=2))
    reuse.add(0.8, residual)
    assert torch.equal(reuse.predict(0.5), residual)


def test_a_second_evaluation_at_one_noise_level_replaces_the_first() -> None:
    history = History(ORDERS["taylor"])
    for sigma, value in ((0.9, 1.0), (0.8, 5.0), (0.8, 2.0)):
        history.add(sigma, torch.full((1, 2, 3), value))
    assert torch.allclose(history.predict(0.7), torch.full((1, 2, 3), 3.0), atol=1e-5)


def test_prediction_keeps_the_dtype_of_the_model() -> None:
    history = History(ORDERS["taylor"])
    for sigma in (0.9, 0.8):
        history.add(sigma, noise(1, 4, 3).bfloat16())
    assert history.predict(0.7).dtype == torch.bfloat16


def test_change_is_the_ratio_of_means_and_of_nothing_it_is_infinite() -> None:
    before, now = noise(1, 7, 5, seed=1), noise(1, 7, 5, seed=2)
    expected = float((before - now).abs().mean() / before.abs().mean())
    assert change(float((before - now).abs().sum()), float(before.abs().sum())) == pytest.approx(expected)
    assert change(1.0, 0.0) == change(0.0, 0.0) == math.inf


DECISIONS = [
    ([0.05], True),
    ([0.1], False),
    ([0.05, 0.09], True),
    ([0.05, 0.11], False),
    ([math.nan], False),
    ([0.05, math.inf], False),
]


@pytest.mark.parametrize("changes, hit", DECISIONS)
def test_a_hit_needs_every_condition_strictly_under_the_threshold(changes: list[float], hit: bool) -> None:
    assert decide(changes, 0.1) is hit


def test_hits_count_by_condition_and_a_computed_forward_starts_over() -> None:
    decisions = Decisions(Cache(0.1, max_consecutive_hits=2), Window())
    shapes = {"a": 1, "b": 1}
    assert not decisions.known(shapes)
    decisions.record(shapes, 1.0, (), False)
    assert decisions.known(shapes) and decisions.may_hit(shapes)
    decisions.record({"a": 1}, 0.9, (0.01,), True)
    decisions.record({"a": 1}, 0.8, (0.01,), True)
    assert not decisions.may_hit(shapes) and not decisions.may_hit({"a": 1}) and decisions.may_hit({"b": 1})
    decisions.record({"a": 1}, 0.7, (0.5,), False)
    assert decisions.conditions["a"] == Condition(1, hits=0) and decisions.may_hit(shapes)


@pytest.mark.parametrize(
    "changed",
    [
        {"x": torch.zeros(2, 16, 8, 10)},
        {"x": torch.zeros(2, 16, 8, 8, dtype=torch.bfloat16)},
        {"x": torch.zeros(4, 16, 8, 8)},
        {"context": torch.zeros(2, 9, 4)},
        {"ref_latents": [torch.zeros(2, 16, 4, 8)]},
        {"ref_latents": [torch.zeros(2, 16, 4, 4)] * 2},
        {"ref_latents": None},
        {"control": {"input": [torch.zeros(2, 16, 96)]}},
    ],
    ids=["size", "dtype", "rows", "text", "reference size", "one more reference", "no reference", "control begins"],
)
def test_a_call_of_other_shapes_is_not_comparable(comfy: None, changed: dict[str, torch.Tensor]) -> None:
    from para_core.comfy.calls import ModelCall
    from para_core.comfy.lanes import Call

    def shape(x: torch.Tensor, context: torch.Tensor, **rest):
        options = {"cond_or_uncond": [0, 1], "uuids": ["a", "b"]}
        return ModelCall(Call((x, None, context, options), rest), ["x", "timestep", "context", "transformer_options"]).shape

    plain = {"x": torch.zeros(2, 16, 8, 8), "context": torch.zeros(2, 7, 4), "ref_latents": [torch.zeros(2, 16, 4, 4)]}
    decisions = Decisions(Cache(0.1), Window())
    decisions.record({"a": shape(**plain)}, 1.0, (), False)
    assert decisions.known({"a": shape(**plain)})
    assert not decisions.known({"a": shape(**{**plain, **changed})})


def test_conditions_in_one_call_and_in_calls_of_their_own_have_the_same_shape(comfy: None) -> None:
    from para_core.comfy.calls import ModelCall
    from para_core.comfy.lanes import Call

    def shape(rows: int):
        options = {"cond_or_uncond": list(range(rows)), "uuids": list(range(rows)), "sigmas": torch.zeros(rows)}
        rest = {"ref_latents": [torch.zeros(rows, 16, 4, 4)], "y": torch.zeros(rows, 8), "method": "index"}
        return ModelCall(Call((torch.zeros(rows, 16, 8, 8), options), rest), ["x", "transformer_options"]).shape

    assert shape(1) == shape(2) == shape(3)


def test_both_rules_do_without_float64_which_some_devices_lack(comfy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.overrides import TorchFunctionMode

    from para_core.cache import first_block
    from para_core.comfy import forecasting

    class Single(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            assert getattr(result, "dtype", None) is not torch.float64, f"{function} made one"
            return result

    def strictly(holder: type, name: str) -> None:
        original = getattr(holder, name)

        def strict(*args, **kwargs):
            seen.add(name)
            with Single():
                return original(*args, **kwargs)

        monkeypatch.setattr(holder, name, strict)

    seen: set[str] = set()
    for holder, names in ((first_block.FirstBlockCache, ("observe", "finish")), (forecasting.Forecaster, ("answer", "learn"))):
        for name in names:
            strictly(holder, name)
    for rule in RULES:
        _, report = run(load("flux_small"), Job("flux_small", steps=6), Cache(1e9, predictor="taylor", rule=rule))
        assert report["cached"] >= 2
    assert seen == {"observe", "finish", "answer", "learn"}


def test_window_includes_both_ends() -> None:
    window = Window(start=0.9, end=0.3)
    assert [window.holds(sigma) for sigma in (0.95, 0.9, 0.5, 0.3, 0.2)] == [False, True, True, True, False]
    assert Window().holds(1000.0), "the default holds everything"
