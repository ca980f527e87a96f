"""The rules that plans share say of local rows what the whole values say of all rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from para_core.plans.rules import ranges
from para_core.sequence.cut import Cut

lengths = st.integers(1, 23)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(text=lengths, image=lengths, ranks=st.integers(1, 5), data=st.data())
def test_ranges_with_one_index_or_one_a_row(text: int, image: int, ranks: int, data) -> None:
    total = text + image
    borders = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=4))})
    spans = list(zip(borders, borders[1:], strict=False))
    each = data.draw(st.lists(st.booleans(), min_size=len(spans), max_size=len(spans)))
    whole = [
        (start, stop, torch.arange(start, stop) if rows else -1 - index)
        for index, ((start, stop), rows) in enumerate(zip(spans, each, strict=True))
    ]
    expected = torch.full((total,), -99)
    for start, stop, index in whole:
        expected[start:stop] = index
    for rank in range(ranks):
        cut = Cut(rank, ranks)
        cut.measure("txt", text)
        cut.measure("img", image)
        local = torch.full((cut.width(("txt", "img")),), -99)
        for start, stop, index in ranges(("txt", "img"))(cut, whole):
            local[start:stop] = index
        assert torch.equal(local, cut.local(expected, ("txt", "img"), 0))


@pytest.mark.parametrize(
    ("told", "together"),
    [
        ({"timestep": torch.ones(2, 3)}, False),
        ({"timestep": torch.tensor([[1.0, 0.5], [0.5, 1.0]])}, False),
        ({"timestep": torch.tensor([[1.0, 0.5], [0.5, 0.5]])}, True),
        ({"timestep": (torch.ones(2, 3), torch.tensor([[1.0], [0.0]]))}, True),
        ({"timestep": torch.ones(2, 3), "a_timestep": torch.tensor([[1.0], [0.0]])}, True),
        ({"timestep": torch.ones(2, 3), "denoise_mask": torch.ones(2, 1, 2, 4, 4)}, False),
        ({"timestep": torch.ones(2, 3), "denoise_mask": torch.ones(2, 1, 2, 4, 4) * torch.tensor([1.0, 0.0]).view(2, 1, 1, 1, 1)}, True),
    ],
)
def test_rows_of_ltx_2_stay_together_where_one_decides_for_the_others(told: dict, together: bool) -> None:
    from para_core.plans.ltxav import coupled

    assert coupled(told.get) is together
