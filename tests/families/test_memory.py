"""What ComfyUI is told that a shared step needs is no less than what the busiest card's tensors take, at real sizes."""

from __future__ import annotations

import itertools

import pytest

from para_core.attention.exchange import Way
from para_core.execution.memory import part
from para_core.plans import PLANS, plan_for
from para_core.plans.plan import attribute
from para_core.sequence.mesh import Degrees

from .live import CASES, given, mesh, peak, wan

pytestmark = pytest.mark.usefixtures("comfy")

QUICK = ("wan 14b",)
SHARED = [Degrees(ulysses=2), Degrees(ulysses=4), Degrees(ulysses=8), Degrees(ring=2), Degrees(ring=4), Degrees(ring=2, ulysses=2)]
WAYS = [Way(parts=2), Way(parts=4), Way(wire=True), Way(wire=True, parts=2)]
WEIGHTED = [(Degrees(ulysses=2), (2.0, 1.0)), (Degrees(ulysses=3), (1.0, 3.0, 2.0)), (Degrees(ring=2, ulysses=2), (3.0, 1.0, 2.0, 2.0))]


def told(model, degrees: Degrees, rows: int, speeds=None) -> float:
    plan = plan_for(model)
    return part(degrees, rows, attribute(model, plan.heads), plan.held_outside(model), speeds)


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def test_the_busiest_rank_needs_no_more_than_is_told(name: str, record_property) -> None:
    model, call = CASES[name]()
    stock = peak((model, call), mesh(1, 1))
    rows = call["x"].shape[-2] // 2
    found = {}
    for degrees in SHARED:
        found[degrees] = peak((model, call), mesh(degrees.ring, degrees.ulysses)) / stock
    record_property("of stock's memory", {str(degrees): round(value, 3) for degrees, value in found.items()})
    assert [degrees for degrees in SHARED if found[degrees] > told(model, degrees, rows)] == []
    assert told(model, SHARED[0], rows) < 0.9, "and something is saved"
    for degrees, way in itertools.product((Degrees(ulysses=2), Degrees(ulysses=4), Degrees(ring=2, ulysses=2)), WAYS):
        if degrees.ring == 1 or way.parts == 1:
            most = peak((model, call), mesh(degrees.ring, degrees.ulysses), way)
            assert most / stock <= told(model, degrees, rows), (degrees, way)
    for degrees, speeds in WEIGHTED:
        most = max(peak((model, call), mesh(degrees.ring, degrees.ulysses, rank, speeds)) for rank in range(degrees.world))
        assert most / stock <= told(model, degrees, rows, speeds), (degrees, speeds)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: wan("CameraWanModel", channels=36, camera_conditions=given(1, 24, 21, 480, 832)), id="camera"),
        pytest.param(lambda: wan(channels=48, build=dict(out_dim=48, dim=3072, num_heads=24), timestep=given(1, 21)), id="ti2v"),
    ],
)
def test_nothing_is_promised_of_a_model_whose_memory_does_not_shrink(make) -> None:
    model, call = make()
    usual = part(Degrees(ulysses=8), 30, 40, plan_for(model).outside(wan()[0]))
    assert peak((model, call), mesh(1, 8)) > usual * peak((model, call), mesh(1, 1))
    assert told(model, Degrees(ulysses=8), 30) == 1.0


def test_plans_that_nobody_has_measured_promise_nothing() -> None:
    measured = {"FLUX", "HunyuanVideo", "Wan", "Wan VACE", "CogVideoX", "Mochi", "Qwen-Image", "LTX-Video", "Cosmos-Predict2"}
    for plan in PLANS:
        assert callable(plan.outside) or plan.outside == 1.0 or plan.family in measured, plan.family
    assert part(Degrees(), 1, 1, 0.0) == part(Degrees(batch=2), 1, 1, 0.0) == part(Degrees(ulysses=4), 64, 24, 1.0) == 1.0
