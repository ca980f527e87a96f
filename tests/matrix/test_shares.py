"""Rows and heads in proportion to the speeds of the ranks, and heads that no number of ranks divides."""

from __future__ import annotations

import pytest
from families.ranks import error, shared, stock
from families.tiny.flux import flux
from families.tiny.wan import wan
from hypothesis import given, settings
from hypothesis import strategies as st

from para_core.attention.ulysses import split_heads
from para_core.sequence.cut import Cut
from para_core.sequence.layout import weighted

TOLERANCE = 1e-5  # relative, per forward, float32
weights = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=8)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(length=st.integers(0, 500), weights=weights)
def test_every_row_has_one_rank_and_shares_are_within_a_row_of_proportion(length: int, weights: list[float]) -> None:
    rows = weighted(length, weights)
    exact = [length * weight / sum(weights) for weight in weights]
    assert len(rows) == len(weights) and sum(rows) == length and min(rows) >= 0
    if length >= len(weights):
        assert min(rows) >= 1, "stock blocks take no empty shards"
    starving = sum(share < 1 for share in exact) if length >= len(weights) else 0
    for count, share in zip(rows, exact, strict=True):
        assert share - count < 1 + starving  # what a rank gives up for those who would have nothing
        assert count - share < 1 + 1e-9
    if not starving:
        assert all(abs(count - share) < 1 for count, share in zip(rows, exact, strict=True))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(units=st.integers(1, 60), unit=st.integers(1, 5), weights=weights)
def test_cut_keeps_units_together_and_loses_no_row(units: int, unit: int, weights: list[float]) -> None:
    cut = Cut(0, len(weights), weights)
    cut.measure("img", units * unit, unit)
    assert sum(cut.rows["img"]) == units * unit and all(rows % unit == 0 for rows in cut.rows["img"])


@pytest.mark.parametrize("speeds", [(1.0, 0.0), (1.0, -2.0), ()])
def test_speeds_that_are_none_are_refused(speeds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="positive"):
        weighted(10, speeds)


def test_faster_ranks_get_more_heads() -> None:
    assert split_heads(24, 24, 3, (3.0, 2.0, 1.0)).q == (12, 8, 4)
    assert split_heads(6, 2, 2, (3.0, 1.0)).q == (3, 3)  # grouped queries stay even


speeds = st.lists(st.sampled_from([0.1, 0.5, 1.0, 1.7, 4.0]), min_size=6, max_size=6)
sweep = settings(derandomize=True, deadline=None, max_examples=12)
meshes = st.sampled_from([(1, 2), (1, 3), (1, 5), (2, 1), (3, 1), (5, 1), (2, 2), (2, 3), (3, 2)])


@pytest.mark.usefixtures("comfy")
@sweep
@given(mesh=meshes, speeds=speeds, heads=st.integers(3, 6), text=st.integers(6, 13), size=st.tuples(st.integers(4, 9), st.integers(6, 9)))
def test_flux_with_uneven_shares_equals_stock(mesh, speeds, heads, text, size) -> None:
    ring, ulysses = mesh[0], min(mesh[1], heads)
    model, call = flux(heads=heads, size=size, text=text)
    (result,), _ = shared(model, [call], ring, ulysses, speeds=speeds)
    assert error(result, stock(model, call)) < TOLERANCE


@pytest.mark.usefixtures("comfy")
@sweep
@given(mesh=meshes, speeds=speeds, heads=st.integers(3, 6), size=st.tuples(st.integers(1, 3), st.integers(6, 9), st.integers(4, 9)))
def test_wan_with_uneven_shares_equals_stock(mesh, speeds, heads, size) -> None:
    ring, ulysses = mesh[0], min(mesh[1], heads)
    model, call = wan(heads=heads, size=size)
    (result,), _ = shared(model, [call], ring, ulysses, speeds=speeds)
    assert error(result, stock(model, call)) < TOLERANCE


@pytest.mark.usefixtures("comfy")
@pytest.mark.parametrize("heads, ring, ulysses", [(12, 1, 5), (30, 1, 4), (3, 1, 2), (7, 2, 2), (30, 1, 7)])
@pytest.mark.parametrize("family", ["flux", "wan"])
def test_heads_that_do_not_divide_are_exact_under_ulysses(family: str, heads: int, ring: int, ulysses: int) -> None:
    model, call = (flux if family == "flux" else wan)(heads=heads)
    (result,), _ = shared(model, [call], ring, ulysses)
    assert error(result, stock(model, call)) < TOLERANCE
