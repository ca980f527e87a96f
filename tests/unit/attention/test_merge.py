"""Attention over parts of the keys, merged, is attention over all of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from para_core.attention.backends.pytorch import plain
from para_core.attention.merge import NO_KEYS, first, merge


def over_parts(q, k, v, mask, cuts, *, dirty=False):
    """Attention by parts of the keys, merged in order. ``dirty`` leaves NaN in rows without keys, as some kernels do."""
    running = None
    for part_k, part_v, part_mask in zip(k.split(cuts, 2), v.split(cuts, 2), mask.split(cuts, 3), strict=True):
        out, lse = plain(q, part_k, part_v, mask=part_mask, scale=None)
        if dirty:
            out = out.masked_fill((lse == NO_KEYS).unsqueeze(-1), float("nan"))
        running = first(out, lse) if running is None else merge(*running, out, lse)
    return running


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(1, 6), min_size=1, max_size=5), seed=st.integers(0, 2**16), spread=st.sampled_from([0.1, 1.0, 30.0]))
def test_merged_parts_equal_the_whole_for_any_cut_and_any_mask(cuts, seed, spread):
    torch.manual_seed(seed)
    keys = sum(cuts)
    q, k, v = spread * torch.randn(2, 3, 4, 8), torch.randn(2, 3, keys, 8), torch.randn(2, 3, keys, 8)
    mask = torch.rand(2, 1, 4, keys) > 0.5
    out, lse = over_parts(q, k, v, mask, cuts, dirty=True)
    whole, whole_lse = plain(q, k, v, mask=mask, scale=None)
    torch.testing.assert_close(out, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_the_order_of_the_parts_does_not_matter(seed):
    torch.manual_seed(seed)
    q, k, v, mask = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 1, 5, 9)
    forward = over_parts(q, k, v, mask, [2, 3, 4])
    backward = over_parts(q, k.flip(2), v.flip(2), mask.flip(3), [4, 3, 2])
    torch.testing.assert_close(forward[0], backward[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(forward[1], backward[1])


def test_a_part_without_keys_has_no_weight_whatever_it_holds():
    out, lse = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2)
    garbage, empty = torch.full((1, 1, 2, 4), float("nan")), torch.full((1, 1, 2), NO_KEYS)
    merged, merged_lse = merge(out, lse, garbage, empty)
    assert torch.equal(merged, out) and torch.equal(merged_lse, lse)
    merged, merged_lse = merge(*first(garbage, empty), out, lse)
    assert torch.equal(merged, out) and torch.equal(merged_lse, lse)


def test_rows_without_any_key_stay_zero():
    garbage, empty = torch.full((1, 1, 2, 4), float("nan")), torch.full((1, 1, 2), NO_KEYS)
    out, lse = merge(*first(garbage, empty), garbage, empty)
    assert torch.equal(out, torch.zeros(1, 1, 2, 4)) and torch.equal(lse, empty)


def test_huge_scores_do_not_overflow():
    out, lse = torch.ones(1, 1, 1, 2), torch.full((1, 1, 1), 5e4)
    merged, merged_lse = merge(out, lse, torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1), -5e4))
    assert torch.equal(merged, out) and torch.equal(merged_lse, lse)


@pytest.mark.parametrize("masked", [False, True])
def test_nan_of_a_broken_kernel_is_kept(masked):
    good, lse = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1)
    assert merge(good, lse, good * float("nan"), lse, masked=masked)[0].isnan().all()
    assert merge(good, lse, good, lse * float("nan"), masked=masked)[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parts_in_half_precision_are_merged_in_float32(dtype):
    torch.manual_seed(0)
    part, lse = torch.randn(1, 1, 3, 4).to(dtype), torch.randn(1, 1, 3)
    out, _ = merge(*first(part, lse, masked=False), part, lse - 3, masked=False)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, part.float())
