"""Every family with compiled blocks and as CUDA graphs equals stock: nothing in a block breaks the compiler's graph."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from env.rewriting import ForRanks, Rewriting

from .cases import CASES
from .ranks import Result, error, later, listed, make, shared, stock
from .test_families import TOLERANCE, build, ids, some

pytestmark = pytest.mark.usefixtures("comfy")
ALL_REWRITES = ("flux", "chroma", "hunyuan video")
NAMES = [name for name in CASES if "control" not in name]  # residuals are added between blocks, as ever


def run(model: torch.nn.Module, steps: list, *, backend: str | Callable | None, graph: bool = False) -> tuple[list[Result], int, list[str]]:
    """Results, graphs replayed, and what was said."""
    from comfy.ldm.modules.attention import optimized_attention

    from para_core.attention.choice import Chooser
    from para_core.comfy import calls
    from para_core.execution.compiled import CompiledBlocks
    from para_core.execution.override import OVERRIDE
    from para_core.execution.runner import Runner
    from para_core.plans import plan_for
    from para_core.sequence.replace import replace
    from para_core.sequence.solo import SOLO_MESH

    torch._dynamo.reset()
    said: list[str] = []
    runner = Runner(plan_for(model), model, Chooser(None, say=said.append), cached=False, stock=optimized_attention)
    if backend is not None:
        runner.compiled = CompiledBlocks(runner.hooks, runner.override, OVERRIDE, said.append, backend=backend)
    entry, names = getattr(model, calls.entry(model)), calls.names(model)
    undo = replace(
        model, calls.entry(model), lambda *args, **kwargs: runner.run(entry, names, args, kwargs, mesh=SOLO_MESH, graph=graph)
    )
    try:
        with torch.inference_mode():
            results = [listed(make(model, call, {OVERRIDE: runner.override})) for call in steps]
    finally:
        undo()
        replays = runner.graphs.replays
        runner.remove()
    return results, replays, said


@pytest.mark.parametrize("name", [case for case in some(20) if (case if isinstance(case, str) else case.values[0]) in NAMES], ids=ids)
def test_compiled_blocks_equal_stock(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their graphs rewritten as they are on a card."""
    model, call = build(name)
    torch._dynamo.utils.counters.clear()
    rewriting = Rewriting(monkeypatch)
    (result,), _, said = run(model, [call], backend=rewriting)
    assert said == [] and torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert error(result, stock(model, call)) < TOLERANCE
    if name in ALL_REWRITES:
        assert all(rewriting.applied.values())


SEVERAL = ("ltx 2", "sd3.5 medium", "wan vace")  # blocks with several kinds of exchanged calls, or beside the others


def compiled_and_shared() -> list:
    """Few of them quick: each is compiled by two ranks."""
    # Z-Image Omni sorts row numbers, which the compiler takes for variables once they differ, as between these ranks of one process.
    names = [name for name in NAMES if name != "z-image omni"]
    quick = {*SEVERAL, *random.Random(21).sample(names, 4)}
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", compiled_and_shared(), ids=ids)
def test_compiled_blocks_that_ranks_share_equal_stock(name: str) -> None:
    model, call = build(name)
    torch._dynamo.reset()
    (result,), _ = shared(model, [call], 1, 2, compiled="eager")
    assert error(result, stock(model, call)) < TOLERANCE


PARALLEL = ("flux", "flux mask", "flux2", "flux2 reference at timestep zero", "chroma", "chroma radiance", "hunyuan video", "hunyuan image")
"""Families with blocks whose MLP stands beside attention."""
SHARES = {
    "two ranks": (1, 2, None),
    "three uneven ranks": (1, 3, (1.0, 0.6, 0.9)),
    "two rings": (2, 2, None),
    "a ring": (2, 1, None),
    "alone": (1, 1, None),
}
"""Ring, Ulysses and speeds of the ranks."""
QUICK = {("flux", "two ranks"), ("flux2", "three uneven ranks"), ("chroma", "three uneven ranks"), ("hunyuan video", "two rings")}
QUICK |= {("flux", "a ring"), ("flux", "alone")}


def beside() -> list:
    every = [(name, shares) for name in PARALLEL for shares in SHARES]
    return [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in every]


@pytest.mark.parametrize(("name", "shares"), beside(), ids=ids)
def test_blocks_whose_mlp_is_computed_beside_the_exchange_equal_stock(name: str, shares: str) -> None:
    model, call = build(name)
    ring, ulysses, speeds = SHARES[shares]
    torch._dynamo.reset()
    backend = ForRanks()
    (result,), _ = shared(model, [call], ring, ulysses, speeds=speeds, compiled=backend)
    assert error(result, stock(model, call)) < TOLERANCE
    assert backend.applied


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float32], ids=str)
def test_weights_that_their_layer_casts_are_cut_too(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.ops

    from .tiny import common

    monkeypatch.setattr(common, "settings", lambda: {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.manual_cast})
    model, call = CASES["flux"]()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype if name.endswith(("linear1.weight", "linear2.weight")) else torch.float32)
    torch._dynamo.reset()
    backend = ForRanks()
    (result,), _ = shared(model, [call], 1, 2, compiled=backend)
    assert error(result, stock(model, call)) < TOLERANCE
    assert backend.applied


def on_each(value, change):
    """Every tensor in nested containers changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: on_each(one, change) for key, one in value.items()}
    return type(value)(on_each(one, change) for one in value) if isinstance(value, (list, tuple)) else value


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", NAMES, ids=ids)
def test_a_replayed_forward_equals_the_eager_one(name: str) -> None:
    """Inputs change from step to step: what stock code keeps in Python between forwards would show."""
    model, call = build(name)
    model = model.cuda()
    half = on_each(call["timestep"], lambda tensor: tensor * 0.5)
    steps = [call, later(call), later(call, 0.1), {**later(call, 0.2), "timestep": half}]
    steps = [on_each(step, torch.Tensor.cuda) for step in steps]
    expected = [stock(model, step) for step in steps]
    results, replays, said = run(model, steps, backend=None, graph=True)
    assert replays == 3 or any("without CUDA graphs" in sentence for sentence in said), said
    assert max(error(result, wanted) for result, wanted in zip(results, expected, strict=True)) < TOLERANCE


def test_captures_hear_of_every_attention_call_that_was_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    from para_core.execution.graphs import Graphs

    heard: list[int] = []
    monkeypatch.setattr(Graphs, "attended", lambda _self: heard.append(1))
    model, call = build("flux")
    shared(model, [call])
    assert not heard
    shared(model, [call], ulysses=2)
    assert len(heard) == 2 * (len(model.double_blocks) + len(model.single_blocks))


def test_calls_that_are_exchanged_are_known_by_their_list_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from para_core.execution.ways import Ways

    seen, way = set(), Ways.way

    def noted(ways, exchange, call, where, beside):
        seen.add(where)
        return way(ways, exchange, call, where, beside)

    monkeypatch.setattr(Ways, "way", noted)
    model, call = build("flux")
    shared(model, [call], ulysses=2)
    assert seen == {"double_blocks", "single_blocks"}
