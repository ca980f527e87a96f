"""A forward with code of other nodes, shared by ranks that have only data of it, equals the stock forward."""

from __future__ import annotations

import random

import pytest
from families.cases import CASES
from families.ranks import error, shared, stock
from families.tiny.common import Tiny
from families.tiny.wan import wan

from para_core.attention.choice import Chooser
from para_core.execution.compiled import CompiledBlocks
from para_core.execution.override import OVERRIDE, AttentionOverride
from para_core.plans import PLANS, plan_for
from para_core.sequence.hooks import Hooks

from .rows import FORWARDS

pytestmark = pytest.mark.usefixtures("comfy")
TOLERANCE = 1e-5  # relative, per forward, float32

MESHES = {"2 ulysses": (1, 2), "3 ulysses": (1, 3), "3 ring": (3, 1), "4 unified": (2, 2)}
RUNS = [(name, mesh) for name in FORWARDS for mesh in MESHES]
# every case once, and each mesh in turn; `make test-all` does them all
SAMPLE = {(name, random.Random(index).choice(list(MESHES))) for index, name in enumerate(FORWARDS)}


def marked(runs: list) -> list:
    return [run if run in SAMPLE else pytest.param(*run, marks=pytest.mark.slow) for run in runs]


def ids(value: str) -> str:
    return value.replace(" ", "_")


def one_prompt() -> Tiny:
    """Wan, for the node that takes one prompt at a time."""
    return wan(batch=1)


@pytest.mark.parametrize("name, mesh", marked(RUNS), ids=ids)
def test_forward_with_foreign_code_equals_stock(name: str, mesh: str) -> None:
    _, family, make = FORWARDS[name]
    model, call = CASES[family]() if family in CASES else one_prompt()
    expected = stock(model, call, make())
    (result,), _ = shared(model, [call], *MESHES[mesh], options=make())
    assert error(result, expected) < TOLERANCE
    assert error(stock(model, call), expected) > 1e-3, "the code changes something"


@pytest.mark.parametrize("family, name", [("wan", "attention wan"), ("flux", "attention flux")])
def test_patches_that_come_in_the_middle_of_a_run_are_not_lost_on_compiled_blocks(family: str, name: str) -> None:
    from comfy.ldm.modules.attention import optimized_attention

    model, call = CASES[family]()
    plan = plan_for(model)
    assert plan is not None
    expected, plain = stock(model, call, FORWARDS[name][2]()), stock(model, call)
    hooks = Hooks(plan, model)
    override = AttentionOverride(Chooser(None), hooks, optimized_attention)
    compiled = CompiledBlocks(hooks, override, OVERRIDE, print, backend="eager")
    try:
        assert error(stock(model, call, {OVERRIDE: override}), plain) < TOLERANCE
        assert error(stock(model, call, {**FORWARDS[name][2](), OVERRIDE: override}), expected) < TOLERANCE
        assert compiled.failure is None
    finally:
        compiled.remove()
        hooks.remove()


def test_families_whose_attention_cannot_be_gathered_are_known() -> None:
    families = {plan.family for plan in PLANS if not plan.gatherable}
    assert families == {"LTX-2", "Cosmos 1", "Wan HuMo"}, "the README's table names them"
