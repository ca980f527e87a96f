"""A forward with code of other nodes, shared by ranks that have only data of it, equals the stock forward."""

from __future__ import annotations

import random

import pytest
from families.cases import CASES
from families.ranks import error, shared, stock
from families.tiny.common import Tiny
from families.tiny.wan import wan, wan_call

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
    return wan(**wan_call(batch=1))


@pytest.mark.parametrize("name, mesh", marked(RUNS), ids=ids)
def test_forward_with_foreign_code_equals_stock(name: str, mesh: str) -> None:
    _, family, make = FORWARDS[name]
    model, call = CASES[family]() if family in CASES else one_prompt()
    expected = stock(model, call, make())
    (result,), _ = shared(model, [call], *MESHES[mesh], options=make())
    assert error(result, expected) < TOLERANCE
    assert error(stock(model, call), expected) > 1e-3, "the code changes something"
