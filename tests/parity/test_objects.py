"""Objects that nodes put into a model: ComfyUI takes them out again when the next run loads the model, after ours has begun."""

from __future__ import annotations

import gc
import weakref
from types import MethodType
from typing import Any

import pytest
import torch
from parity.inprocess import Job, attached, changed, error, footprint, load, run, sample

from para_core.execution import runner
from para_core.settings import Attention, Cache, Compile, Parallel

pytestmark = pytest.mark.usefixtures("comfy")
TOLERANCE = 1e-5  # relative, per forward, float32
JOB = Job("flux_small", cfg=3.0, tokens=(11, 7), steps=4)
BLOCK = "diffusion_model.single_blocks.3"


class Around(torch.nn.Module):
    """What stands for a block, as compiling nodes of other packs have it."""

    def __init__(self, block: torch.nn.Module):
        super().__init__()
        self._orig_mod, self.calls = block, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self._orig_mod(*args, **kwargs)


def with_object() -> tuple[Any, Around]:
    model = load("flux_small").clone()
    around = Around(load("flux_small").get_model_object(BLOCK))
    model.add_object_patch(BLOCK, around)
    return model, around


@pytest.mark.parametrize(("settings", "cached"), [((Cache(1e9),), 6), ((Parallel(2, batch_degree=1),), 0), ((Parallel(2), Cache(1e9)), 3)])
@pytest.mark.parametrize("ranks", [2])
def test_what_another_run_has_put_into_the_model_is_not_hooked(settings: tuple, cached: int, ranks: int) -> None:
    model = load("flux_small")
    expected, alone = run(model, JOB, *settings)
    before = footprint(model.model.diffusion_model)
    sample(with_object()[0], JOB)
    result, report = run(model, JOB, *settings)
    assert report["notes"] == [] and report["ranks"] == alone["ranks"] and report["cached"] == alone["cached"] == cached
    assert error(result, expected) < TOLERANCE * JOB.steps
    assert not changed(before, footprint(model.model.diffusion_model))


@pytest.mark.parametrize("settings", [(Cache(1e9),), (Cache(1e-9), Attention("pytorch"))])
def test_what_a_node_puts_into_the_model_is_hooked_from_the_first_run_on(settings: tuple) -> None:
    expected, alone = run(load("flux_small"), JOB, *settings)
    model, around = with_object()
    for turn in range(2):
        result, report = run(model, JOB, *settings)
        assert around.calls == (turn + 1) * (report["forwards"] - report["cached"]), "also a block that stands for another is skipped"
        assert report["cached"] == alone["cached"] and error(result, expected) < TOLERANCE * JOB.steps


def test_a_run_leaves_a_model_that_holds_such_an_object_as_it_found_it() -> None:
    model, around = with_object()
    run(model, JOB, Cache(0.2))
    original = load("flux_small").get_model_object(BLOCK)
    assert original is around._orig_mod and not hasattr(around, "_undo") and "forward" not in vars(around) | vars(original)
    sample(load("flux_small"), JOB)
    assert load("flux_small").model.diffusion_model.single_blocks[3] is original


def with_method(name: str) -> tuple[Any, list[int]]:
    """A clone one of whose methods a node has replaced by one that does the same, and counts."""
    model, calls = load("flux_small").clone(), []
    original = load("flux_small").get_model_object(name)

    def method(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    model.add_object_patch(name, method)
    return model, calls


@pytest.mark.parametrize(("index", "setting"), [(0, Cache(1e9)), (1, Cache(1e9)), (3, Cache(1e9)), (1, Compile("compile"))])
def test_blocks_whose_method_a_node_has_replaced_are_not_cached_or_compiled_and_a_sentence_says_so(
    index: int, setting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "CompiledBlocks", None)
    name = f"diffusion_model.single_blocks.{index}.forward"
    expected = sample(load("flux_small"), JOB)
    model, calls = with_method(name)
    for turn in range(2):
        result, report = run(model, JOB, setting)
        assert torch.equal(result, expected) and len(calls) == (turn + 1) * 2 * JOB.steps
        assert len(report["notes"]) == 1 and name in report["notes"][0] and report["cached"] == 0
    _, report = run(load("flux_small"), JOB, Cache(1e9))
    assert report["cached"] == 6


@pytest.mark.parametrize("part", ["self_attn", "cross_attn"])
@pytest.mark.parametrize("good", [True, False], ids=["for good", "object patch"])
@pytest.mark.parametrize("setting", [Cache(1e9), Compile("compile")], ids=lambda one: type(one).__name__)
def test_code_in_a_part_of_a_block_runs_with_the_options_it_looks_at(setting: Any, good: bool, part: str, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model, job = load("wan").clone(), Job("wan", size=(3, 6, 10), steps=4)
    held = model.get_model_object(f"diffusion_model.blocks.1.{part}")

    def forward(self: Any, *args: Any, transformer_options: Any = None, **kwargs: Any) -> Any:
        early = "sigmas" in transformer_options and transformer_options["sigmas"][0] > 0.8
        return (5.0 if early else 1.0) * type(self).forward(self, *args, transformer_options=transformer_options, **kwargs)

    plain = sample(model, job)
    try:
        if good:
            held.forward = MethodType(forward, held)
        else:
            model.add_object_patch(f"diffusion_model.blocks.1.{part}.forward", MethodType(forward, held))
        expected = sample(model, job)
        result, report = run(model, job, setting)
    finally:
        vars(held).pop("forward", None)
    assert error(result, expected) < TOLERANCE * job.steps < 1e-3 < error(expected, plain)
    assert report["cached"] == 0 and "left out, because of" in report["notes"][0]


@pytest.mark.parametrize("settings", [(Cache(1e9),), (Cache(1e9, rule="forecast"),), (Attention("pytorch"),)])
def test_calls_go_through_the_run_where_a_node_has_replaced_the_model_s_method(settings: tuple) -> None:
    job = JOB.but(steps=6)
    expected, alone = run(load("flux_small"), job, *settings)
    model, calls = with_method("diffusion_model._forward")
    for _ in range(2):
        calls.clear()
        result, report = run(model, job, *settings)
        assert torch.equal(result, expected) and report["cached"] == alone["cached"] and report["forwards"] == alone["forwards"]
        foretold = report["cached"] if settings[0] == Cache(1e9, rule="forecast") else 0
        assert len(calls) == report["forwards"] - foretold
    assert torch.equal(run(load("flux_small"), job, *settings)[0], expected)


@pytest.mark.parametrize("settings", [(Cache(0.2),), (Cache(1.0, rule="forecast"),), (Attention("pytorch"),)])
def test_nothing_but_the_graph_keeps_a_model_after_its_run(settings: tuple) -> None:
    """ComfyUI frees a model when its last patcher goes: not only when Python looks for circles."""
    model = attached(load("flux_small"), *settings)
    kept = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        sample(model, JOB)
        del model
        assert kept() is None
    finally:
        gc.enable()
