"""Every family, cut for several ranks and cached, equals the stock model."""

from __future__ import annotations

import functools
import math
import random

import pytest
import torch

from .cases import CASES
from .ranks import Result, error, later, shared, stock
from .tiny import Tiny

pytestmark = pytest.mark.usefixtures("comfy")
TOLERANCE = 1e-5  # relative, per forward, float32


def family(name: str) -> str:
    """The family of a case: a word or two."""
    return next((two for two in ("hunyuan image", "ltx 2", "cosmos 1") if name.startswith(two)), name.split(" ")[0])


MESHES = {"2 ulysses": (1, 2), "2 ring": (2, 1), "3 ulysses": (1, 3), "3 ring": (3, 1), "4 unified": (2, 2)}
LITTLE = {"ltx 2 little audio": 2}  # ranks that find a row each; more are never asked, see `Plan.fewest`
RUNS = [(name, mesh) for name in CASES for mesh, degrees in MESHES.items() if math.prod(degrees) <= LITTLE.get(name, 4)]
FAMILIES = sorted({family(name) for name in CASES})
# One run a family and thirty of any, the same every time; `make test-all` does them all.
SAMPLE = {random.Random(7).choice([run for run in RUNS if family(run[0]) == one]) for one in FAMILIES}
SAMPLE |= set(random.Random(7).sample(RUNS, 30))


@functools.lru_cache(maxsize=4)
def build(name: str) -> Tiny:
    return CASES[name]()


def ids(value) -> str:
    return value.replace(" ", "_") if isinstance(value, str) else ""


def marked(runs) -> list:
    return [run if run in SAMPLE else pytest.param(*run, marks=pytest.mark.slow) for run in runs]


def some(seed: int) -> list:
    """Cases by name: one of every family, and the rest slow."""
    chosen = {random.Random(seed).choice([name for name in CASES if family(name) == one]) for one in FAMILIES}
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("name, mesh", marked(RUNS), ids=ids)
def test_shared_forward_equals_stock(name: str, mesh: str) -> None:
    model, call = build(name)
    (result,), _ = shared(model, [call], *MESHES[mesh])
    assert error(result, stock(model, call)) < TOLERANCE


@pytest.mark.parametrize("name", ["ltx video weak guide", "ltx 2 weak guide", "ltx video mask"], ids=ids)
def test_attention_that_the_model_forbids_to_quantise_is_not_quantised_when_shared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from para_core.execution import override

    asked: list[bool] = []
    attend = override.attend_call

    def attend_call(exchange, call, *rest):
        if exchange is not None and call.mask is not None:
            asked.append(call.low_precision or call.kwargs.get("low_precision_attention") is not False)
        return attend(exchange, call, *rest)

    monkeypatch.setattr(override, "attend_call", attend_call)
    model, call = build(name)
    (result,), _ = shared(model, [call], 1, 2)
    assert error(result, stock(model, call)) < TOLERANCE
    assert not any(asked) and bool(asked) is ("guide" in name)


@pytest.mark.parametrize("name", some(1), ids=ids)
def test_tokens_made_whole_between_blocks_change_nothing(name: str) -> None:
    model, call = build(name)
    (result,), _ = shared(model, [call], 1, 3, whole=True)
    assert error(result, stock(model, call)) < TOLERANCE


@pytest.mark.parametrize("name", some(2), ids=ids)
def test_without_the_exchange_results_are_wrong(name: str) -> None:
    model, call = build(name)
    try:
        (result,), _ = shared(model, [call], 1, 2, exchanged=False)
    except RuntimeError as mismatch:  # a mask for all tokens does not fit
        assert "must match the size" in str(mismatch)
    else:
        assert error(result, stock(model, call)) > 1e-2


@pytest.mark.parametrize("name", some(3), ids=ids)
def test_cache_that_never_hits_is_bit_identical(name: str) -> None:
    model, call = build(name)
    steps = [call, later(call), later(call, 0.1)]
    expected = [stock(model, step) for step in steps]
    results, hits = shared(model, steps, thresholds=[0.0] * 3)
    assert hits == [False] * 3
    assert identical(results, expected)
    on_two, _ = shared(model, steps, 1, 2, thresholds=[0.0] * 3)
    uncached, _ = shared(model, steps, 1, 2)
    assert identical(on_two, uncached)
    assert identical([stock(model, call)], expected[:1]), "the model is as it was"


@pytest.mark.parametrize("name", some(4), ids=ids)
def test_forced_hits_are_the_same_on_several_ranks_as_on_one(name: str) -> None:
    model, call = build(name)
    steps, thresholds = [call, later(call), later(call, 0.1)], [0.0, 1e9, 1e9]
    expected, hits = shared(model, steps, thresholds=thresholds)
    assert hits == [False, True, True]
    for ring, ulysses in ((1, 2), (3, 1)):
        results, theirs = shared(model, steps, ring, ulysses, thresholds=thresholds)
        assert theirs == hits
        assert max(error(result, wanted) for result, wanted in zip(results, expected, strict=True)) < TOLERANCE
    assert error(expected[1], stock(model, steps[1])) > 1e-4, "a hit is not a computed step"


@pytest.mark.parametrize("name", some(5), ids=ids)
def test_hit_on_an_unchanged_step_reproduces_it(name: str) -> None:
    model, call = build(name)
    for ring, ulysses in ((1, 1), (1, 2)):
        results, hits = shared(model, [call, call], ring, ulysses, thresholds=[0.0, 1e9])
        assert hits == [False, True]
        assert error(results[1], stock(model, call)) < TOLERANCE


@pytest.mark.parametrize("name", some(6), ids=ids)
def test_removal_leaves_the_model_as_it_was(name: str) -> None:
    model, call = build(name)
    before = footprint(model)
    shared(model, [call], thresholds=[0.0])
    assert footprint(model) == before


def identical(results: list[Result], expected: list[Result]) -> bool:
    pairs = zip(results, expected, strict=True)
    return all(torch.equal(one, other) for result, wanted in pairs for one, other in zip(result, wanted, strict=True))


def footprint(model: torch.nn.Module) -> list:
    """What a run could leave: replaced methods and hooks, of every submodule."""
    return [
        (name, "forward" in vars(part), "_forward" in vars(part), len(part._forward_hooks), len(part._forward_pre_hooks))
        for name, part in model.named_modules()
    ]
