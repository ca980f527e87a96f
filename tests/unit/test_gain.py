"""The forecast of what splitting gains: known machines and models come out on the right side."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from para_core.execution.gain import EAGER, WORTH, Work, gain, last, reached, seconds, speeds
from para_core.sequence.mesh import Degrees, Link, replica_speeds

FLUX = Work(1, 4608, 3072, 57, 8_600_000_000)
WAN = Work(2, 32760, 5120, 40, 13_600_000_000)
H100, ADA = 7e14, 1.6e14
NVLINK, PCIE, SLOW = Link(5e-5, 2e11), Link(3e-5, 1.2e10), Link(1e-3, 1e9)


def test_the_step_of_a_known_machine_is_forecast_within_a_third():
    assert seconds(FLUX, Degrees(), H100) == pytest.approx(0.180, rel=0.33)
    one_row = Work(1, *[getattr(WAN, name) for name in ("tokens", "width", "layers", "parameters")])
    assert seconds(one_row, Degrees(), H100) == pytest.approx(3.9, rel=0.33)


@pytest.mark.parametrize(
    ("work", "rate", "link", "pays"),
    [
        (FLUX, H100, NVLINK, True),
        (FLUX, H100, PCIE, False),  # an H100 is too fast for such a link
        (FLUX, ADA, PCIE, True),
        (FLUX, ADA, SLOW, False),
        (WAN, H100, PCIE, True),
        (Work(1, 256, 3072, 57, FLUX.parameters), H100, NVLINK, False),  # a thumbnail: waiting costs more than its arithmetic
        (Work(1, 64, 256, 6, 10_000_000), H100, NVLINK, False),
    ],
)
def test_splitting_a_sequence_over_two_ranks_pays_where_the_link_is_fast_for_the_gpu(work, rate, link, pays):
    assert (gain(work, Degrees(ulysses=2), rate, link) > WORTH) is pays


@pytest.mark.parametrize(("slower", "pays"), [(1.2e14, True), (7e13, True), (2e13, False)])
@pytest.mark.parametrize("first", [True, False], ids=["faster card first", "slower card first"])
def test_splitting_with_a_slower_card_pays_while_its_share_is_worth_the_exchange(slower, pays, first):
    rates = (ADA, slower)
    both = reached(FLUX, Degrees(ulysses=2), rates, 24)
    if first:
        assert (gain(FLUX, Degrees(ulysses=2), ADA, PCIE, both) > WORTH) is pays
    else:
        assert gain(FLUX, Degrees(ulysses=2), slower, PCIE, both) > WORTH


@pytest.mark.parametrize("degrees", [Degrees(ulysses=2), Degrees(ring=2)], ids=str)
def test_the_speeds_of_unlike_ranks_add_up_where_shares_can_follow_them(degrees):
    assert 2 * reached(FLUX, degrees, (2e14, 1e14), 24) == pytest.approx(3e14)
    assert 2 * reached(FLUX, degrees, (2e14, 1.9e14), 24) == pytest.approx(3.8e14)  # about equal: shares are even, all wait


def test_a_forecast_counts_the_heads_that_cannot_be_cut_and_the_batch_that_is_shared_evenly():
    whole, few = (2 * reached(FLUX, Degrees(ulysses=2), (2e14, 1e14), heads) for heads in (24, 2))
    assert 2e14 < few < whole
    assert 2 * reached(FLUX, Degrees(batch=2), (2e14, 1e14), 24) == pytest.approx(2e14)
    four = reached(FLUX, Degrees(batch=2, ulysses=2), (2e14, 1e14, 1e14, 1e14), 24)
    assert 4 * four == pytest.approx(4e14)  # the second replica is the slower one


@pytest.mark.parametrize(
    ("rates", "found"),
    [
        ((1e14, 1e14), None),
        ((1e14, 0.92e14), None),
        ((0.46e14, 1e14), (0.45, 1.0)),
        ((1e14, 0.44e14), (1.0, 0.45)),  # noise
        ((1e14, 1e11), (1.0, 0.05)),  # nobody has nothing
        ((1e14, 0.99e14, 0.5e14), (1.0, 1.0, 0.5)),
    ],
)
def test_speeds_are_rounded_and_none_where_they_are_about_equal(rates, found):
    assert speeds(rates, Degrees(ring=len(rates)), 24) == found
    assert speeds((*rates, 1e13), Degrees(ring=len(rates)), 24) == found, "ranks without a share do not count"


def test_a_replica_has_the_same_speeds_whether_asked_about_alone_or_with_others():
    rates = (5e13, 2.8e13, 1e14, 9e13)
    both, alone = (replica_speeds(speeds(rates, Degrees(batch, 1, 2), 24), Degrees(batch, 1, 2), 0) for batch in (2, 1))
    assert both == alone == (0.5, 0.3)
    assert replica_speeds((1.0, 1.0, 1.0, 0.5), Degrees(2, 1, 2), 0) is None, "these two are alike"


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    ring=st.integers(1, 3),
    ulysses=st.integers(1, 4),
    rates=st.lists(st.integers(2, 20), min_size=12, max_size=12),
    fastest=st.integers(0, 11),
    more=st.integers(0, 6),
    tokens=st.sampled_from([4608, 200000]),
)
def test_shares_by_speed_are_never_slower_than_even_ones(ring, ulysses, rates, fastest, more, tokens):
    degrees, heads = Degrees(ring=ring, ulysses=ulysses), ulysses + more
    rates[fastest % degrees.world] = 20  # of which the others are whole parts: nothing is rounded
    found = tuple(5e12 * rate for rate in rates[: degrees.world])
    work = Work(1, tokens, FLUX.width, FLUX.layers, FLUX.parameters)
    by_rows, by_heads = last((1.0,) * degrees.world, found, ulysses, heads)
    attention = 4 * tokens**2 * work.width * work.layers / work.operations
    even = 1 / (degrees.world * ((1 - attention) * by_rows + attention * by_heads))
    assert reached(work, degrees, found, heads) >= even * (1 - 1e-6)


def test_even_shares_are_taken_where_coarse_ones_would_be_done_later():
    degrees = Degrees(ring=2, ulysses=2)
    assert speeds((0.25, 1.0, 0.25, 0.25), degrees, 24) == (0.25, 1.0, 0.25, 0.25)
    assert speeds((0.25, 1.0, 0.25, 0.25), degrees, 2) == (1.0,) * 4


@pytest.mark.parametrize(
    ("tokens", "rate", "link", "launching", "pays"),
    [
        (1024, H100, NVLINK, EAGER, False),  # 512 x 512: one GPU waits for the processor already
        (1024, H100, NVLINK, 0.0, True),
        (4608, H100, NVLINK, EAGER, True),
        (1024, ADA, PCIE, EAGER, True),
    ],
)
def test_ranks_do_not_shorten_what_the_processor_takes_to_launch(tokens, rate, link, launching, pays):
    work = Work(1, tokens, FLUX.width, FLUX.layers, FLUX.parameters)
    assert (gain(work, Degrees(ulysses=2), rate, link, launching=launching) > WORTH) is pays


def test_sharing_the_batch_exchanges_nothing():
    assert gain(WAN, Degrees(batch=2), H100, SLOW) == pytest.approx(2.0)
    assert gain(Work(3, 100, 10, 2, 1000), Degrees(batch=2), H100, SLOW) == pytest.approx(1.5)


@pytest.mark.parametrize("degrees", [Degrees(ulysses=4), Degrees(ring=4), Degrees(ring=2, ulysses=2)], ids=str)
def test_more_ranks_gain_more_on_a_fast_link_and_never_more_than_their_number(degrees):
    assert gain(WAN, Degrees(ulysses=2), H100, NVLINK) < gain(WAN, degrees, H100, NVLINK) < 4
