"""The covering array covers what it says, and the axes leave nothing out without a reason."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from .axes import AXES, excluded
from .covering import covering, pairs
from .plan import MOST, RUNS, SAMPLE


def held(runs) -> set:
    return {frozenset(pair) for run in runs for pair in itertools.combinations(run.items(), 2)}


@settings(derandomize=True, deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(1, 6), min_size=2, max_size=6), seed=st.integers(0, 5), forbidden=st.integers(0, 4))
def test_every_allowed_pair_is_covered_and_no_other(sizes: list[int], seed: int, forbidden: int) -> None:
    axes = {f"axis{index}": [str(value) for value in range(size)] for index, size in enumerate(sizes)}

    def rule(one, other) -> str:
        first = one if one[0] == "axis0" else other
        second = other if first is one else one
        apart = first[0] == "axis0" and second[1] != "0" and (int(first[1]) + int(second[1])) % 5 < forbidden and first[1] != "0"
        return "apart" if apart else ""

    runs = covering(axes, rule, seed)
    table = pairs(axes, rule)
    assert held(runs) == {frozenset((one, other)) for one, others in table.items() for other, reason in others.items() if not reason}
    assert runs == covering(axes, rule, seed)
    two = sorted(sizes)[-2:]
    assert len(runs) <= 3 * two[0] * two[1] + len(sizes)


def test_the_matrix_covers_every_pair_that_has_no_reason_against_it() -> None:
    table = pairs(AXES, excluded)
    assert held(vars(run) for run in RUNS) == {
        frozenset((one, other)) for one, others in table.items() for other, reason in others.items() if not reason
    }
    assert len(RUNS) <= MOST


def test_the_sample_has_every_value_of_every_axis() -> None:
    for axis, values in AXES.items():
        assert {getattr(run, axis) for run in SAMPLE} >= set(values)
