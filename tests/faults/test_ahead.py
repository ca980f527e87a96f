"""A sampler that runs ahead of the devices, and ranks that are lost behind its back: CPU ranks stand for devices."""

from __future__ import annotations

import gc
import json
import os
import signal
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faults.sampling import REPORT, STEPS, TOLERANCE, Prompt, at_step, check_full, log_lines, prepared, reference, run
from parity import inprocess

LOST = "rank 1 on cpu was ended by SIGKILL"


@pytest.fixture(autouse=True)
def _on_the_cpu(comfy, monkeypatch):
    monkeypatch.setattr("para_core.comfy.ahead.DEVICES", ("cpu",))


@pytest.fixture
def under_way(group, monkeypatch) -> list[int]:
    """How many forwards were under way when the group was to wait for them."""
    counts: list[int] = []
    original = group.land

    def land(leaving: int = 0) -> None:
        counts.append(group.under_way)
        original(leaving)

    monkeypatch.setattr(group, "land", land)
    return counts


@pytest.fixture
def answered(monkeypatch) -> list[int]:
    """Places of the answers that were given from memory."""
    from para_core.comfy.ahead import Ahead

    places: list[int] = []
    original = Ahead.answer

    def answer(self, model_calls):
        found = original(self, model_calls)
        if found is not None:
            places.append(self._next - 1)
        return found

    monkeypatch.setattr(Ahead, "answer", answer)
    return places


def killing(group, step: int) -> Callable[[], None]:
    return at_step(group, step, 0.0, lambda: os.kill(group.pids[0], signal.SIGKILL))


def test_the_next_step_begins_before_the_last_one_has_landed(group, under_way, answered) -> None:
    check_full(Prompt())
    # one for every step, and one at the end; the first step of a run is waited for whatever comes
    assert under_way == [0, 0, 1, 2, 2]
    assert group.under_way == 0 and not answered


def test_steps_that_read_the_device_wait_for_it(group, under_way) -> None:
    check_full(Prompt(threshold=1e-9))
    check_full(Prompt(cfg=5.0, tokens=(11, 7)))  # conditions in lanes
    assert not any(under_way)


FORETOLD = inprocess.Job("flux", (10, 14), steps=10)


def foretold(threshold: float) -> tuple[torch.Tensor, list[bool]]:
    """Latents of two ranks under the rule forecast, and which steps were foretold."""
    from para_core.comfy.attach import attach
    from para_core.settings import Cache

    with log_lines() as lines:
        latents = inprocess.sample(attach(prepared(Prompt()), Cache(rule="forecast", threshold=threshold, start_percent=0.0)), FORETOLD)
    report = [json.loads(found.group(1)) for line in lines if (found := REPORT.search(line))][-1]
    return latents, [hit for _sigma, _changes, hit in report["changes"]]


def test_nothing_is_foretold_from_what_has_not_landed(group, under_way) -> None:
    _, hits = foretold(2.0)
    assert any(hits) and 1 in under_way and max(under_way) == 1


@pytest.mark.parametrize("step", [3, *(pytest.param(step, marks=pytest.mark.slow) for step in range(STEPS - 1))])
def test_a_worker_lost_behind_the_samplers_back_costs_no_image(group, answered, step: int) -> None:
    check_full(Prompt())
    undo = killing(group, step)
    outcome = run(Prompt())
    undo()
    (note,) = outcome.report["notes"]
    assert LOST in note
    assert outcome.error(reference(Prompt())) < TOLERANCE
    # steps that had landed by then, as the one before the lost one at the latest had not
    assert answered in (list(range(max(0, step - 2))), list(range(max(0, step - 1))))
    check_full(Prompt())


def losing(group, monkeypatch, number: int, garbage: float = float("nan")) -> list[Any]:
    """The group's step ``number`` (from 1) gives what a lost device leaves in the latents. Returns the steps that were shared."""
    from para_core.comfy.split import Split

    original, steps = Split.step, []

    def step(self, model_calls):
        results = original(self, model_calls)
        steps.append(model_calls)
        if len(steps) != number:
            return results
        group._lose(group.members[0], "was lost in this test", kill=True)
        return [torch.full_like(results[0], garbage)]

    monkeypatch.setattr(Split, "step", step)
    return steps


def test_a_result_that_never_landed_is_computed_again(group, answered, monkeypatch) -> None:
    check_full(Prompt())
    steps = losing(group, monkeypatch, 3)
    outcome = run(Prompt())
    assert "was lost in this test" in outcome.report["notes"][0]
    assert outcome.error(reference(Prompt())) < TOLERANCE
    assert answered in ([0], [0, 1]) and len(steps) == 3


@pytest.mark.parametrize("threshold", [pytest.param(1e-9, marks=pytest.mark.slow), 2.0])
def test_what_is_foretold_after_a_loss_rests_on_what_one_rank_computes(group, answered, monkeypatch, threshold: float) -> None:
    from para_core.comfy.forecasting import Forecaster

    expected, hits = foretold(threshold)
    last = hits.count(False) - 1
    kept, forget = [], Forecaster.forget

    def forgotten(self) -> None:
        forget(self)
        kept.append((*self.forecast.tracks, *self.decisions.conditions))

    monkeypatch.setattr(Forecaster, "forget", forgotten)
    steps = losing(group, monkeypatch, last, 1.0)
    latents, again = foretold(threshold)
    assert len(steps) == last and answered == list(range(len(answered))) and last - 1 <= len(answered)
    assert inprocess.error(latents, expected) < (1e-4 if threshold < 1 else 0.1)
    assert kept == [()] and again.count(False) > hits.count(False), "it starts cold"


@pytest.mark.parametrize(
    "sampler", ["dpmpp_sde", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dpmpp_2m", "heun", "euler_ancestral", "uni_pc"))]
)
def test_samplers_do_the_same_when_they_are_run_again(group, answered, sampler: str) -> None:
    job = inprocess.Job("flux", (10, 14), steps=5, sampler=sampler)
    expected = inprocess.sample(inprocess.load("flux"), job)
    undo = killing(group, 4)
    result = inprocess.sample(prepared(Prompt()), job)
    undo()
    assert answered[:2] == [0, 1]
    assert inprocess.error(result, expected) < 1e-4


def test_a_cancel_is_one_whatever_has_been_lost(group) -> None:
    import comfy.model_management as management

    check_full(Prompt())

    def stop() -> None:
        os.kill(group.pids[0], signal.SIGKILL)
        management.interrupt_current_processing(True)

    undo = at_step(group, 2, 0.0, stop)
    with pytest.raises(management.InterruptProcessingException):
        run(Prompt())
    undo()
    check_full(Prompt())


def test_other_nodes_code_and_samplers_are_never_run_again(comfy) -> None:
    import comfy.samplers

    from para_core.comfy.ahead import repeatable

    class Other(comfy.samplers.CFGGuider):
        pass

    class Own(comfy.samplers.KSAMPLER):
        pass

    def guider(kind: type = comfy.samplers.CFGGuider, control: bool = False, **options: Any) -> Any:
        found = kind.__new__(kind)
        found.model_options = options
        found.original_conds = {"positive": [{"control": object()} if control else {}], "negative": []}
        return found

    def wrapped(key: str) -> dict[str, Any]:
        return {"wrappers": {"calc_cond_batch": {key: [print]}}}

    euler = comfy.samplers.ksampler("euler")
    assert repeatable(guider(transformer_options=wrapped("paradit"), disable_cfg1_optimization=True), euler, "paradit")
    assert not repeatable(guider(transformer_options=wrapped("easycache")), euler, "paradit")
    assert not repeatable(guider(to_load_options=wrapped("easycache")), euler, "paradit")
    assert not repeatable(guider(sampler_post_cfg_function=[print]), euler, "paradit")
    assert not repeatable(guider(context_handler=object()), euler, "paradit")
    assert not repeatable(guider(transformer_options={"patches": {"attn1_patch": [print]}}), euler, "paradit")
    assert not repeatable(guider(), comfy.samplers.ksampler("euler", {"noise_sampler": print}), "paradit")
    assert not repeatable(guider(), comfy.samplers.KSAMPLER(lambda: None), "paradit")
    assert not repeatable(guider(), SimpleNamespace(sampler_function=euler.sampler_function), "paradit")
    assert not repeatable(guider(Other), euler, "paradit")
    assert not repeatable(guider(), Own(euler.sampler_function), "paradit")
    assert not repeatable(guider(control=True), euler, "paradit")


class Sampling:
    """Samples numbers: each "forward" adds what it is told, and may be lost."""

    def __init__(self) -> None:
        from para_core.comfy.ahead import Ahead

        self.ahead = Ahead(torch.device("cpu"), 4)
        self.computed: list[float] = []
        self.lost = 0

    def call(self, x: torch.Tensor) -> torch.Tensor:
        calls: list[Any] = [SimpleNamespace(latents=[x], conditions=["prompt"])]
        known = self.ahead.answer(calls)
        if known is not None:
            return known[0]
        self.computed.append(float(x))
        self.ahead.keep(calls, [x + 1])
        return x + 1

    def land(self) -> None:
        from para_core.comfy.ahead import Overtaken

        if self.lost:
            self.ahead.forget(self.lost)
            self.lost = 0
            raise Overtaken


@pytest.mark.parametrize("error", [None, ValueError("nan")])
def test_a_sampler_runs_again_from_where_results_were_lost(comfy, error) -> None:
    sampling, runs = Sampling(), []

    def sample(x: torch.Tensor) -> torch.Tensor:
        runs.append(torch.rand(()))
        for _ in range(4):
            x.copy_(sampling.call(x.clone()))  # into what it was given
        if len(runs) == 1:
            sampling.lost = 2
            if error is not None:
                raise error
        return x

    assert float(sampling.ahead.sample(sample, [torch.zeros(())], sampling.land)) == 4
    assert sampling.computed == [0, 1, 2, 3, 2, 3]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_errors_that_no_lost_result_explains_are_raised(comfy, kind) -> None:
    sampling = Sampling()

    def sample() -> None:
        sampling.lost = kind is KeyboardInterrupt
        raise kind("as it is")

    with pytest.raises(kind, match="as it is"):
        sampling.ahead.sample(sample, [], sampling.land)


def test_a_sampler_that_does_something_else_the_second_time_is_answered_anew(comfy) -> None:
    sampling, runs = Sampling(), []

    def sample() -> torch.Tensor:
        runs.append(None)
        x = torch.zeros(())
        for step in range(4):
            x = sampling.call(x + (step == 1) * len(runs))
        sampling.lost = len(runs) == 1
        return x

    assert float(sampling.ahead.sample(sample, [], sampling.land)) == 4 + 2
    assert sampling.computed == [0, 2, 3, 4, 3, 4, 5]


def test_what_is_remembered_is_bounded(comfy, monkeypatch) -> None:
    sampling = Sampling()
    calls: list[Any] = [SimpleNamespace(latents=[torch.zeros(8)], conditions=["prompt"])]
    monkeypatch.setattr("para_core.comfy.ahead.ROOM", 4 * 2 * 32)
    for _ in range(6):  # two more than a sampler with one evaluation a step asks for
        ready = sampling.ahead.ready(calls)
        sampling.ahead.keep(calls, [torch.zeros(8)])
    assert not ready and len(sampling.ahead._answers) == 5
    larger: list[Any] = [SimpleNamespace(latents=[torch.zeros(9)], conditions=["prompt"])]
    assert Sampling().ahead.ready(calls) and not Sampling().ahead.ready(larger) and not Sampling().ahead.ready(2 * calls)


def test_nothing_is_remembered_of_what_one_rank_computes(group, monkeypatch) -> None:
    from para_core.comfy.ahead import Ahead
    from para_core.comfy.split import Split

    kept: list[Any] = []
    monkeypatch.setattr(Ahead, "keep", lambda _self, model_calls, _results: kept.append(model_calls))
    monkeypatch.setattr(Split, "_recruit", lambda self, *_: self._estimate.close())
    assert run(Prompt()).report["ranks"] == 1
    assert not kept


def test_a_forward_that_is_looked_through_is_waited_for(group, under_way, monkeypatch) -> None:
    from para_core.execution.runner import Runner

    monkeypatch.setattr(Runner, "settled", False)
    check_full(Prompt())
    assert not any(under_way)


def test_an_error_of_a_run_leaves_nothing_of_it_behind(comfy) -> None:
    sampling = Sampling()

    class Held:
        pass

    def sample() -> None:
        held = Held()
        left.append(weakref.ref(held))
        raise ValueError("as it is")

    left: list[weakref.ref] = []
    gc.disable()
    try:
        with pytest.raises(ValueError, match="as it is"):
            sampling.ahead.sample(sample, [], sampling.land)
        assert left[0]() is None
    finally:
        gc.enable()
