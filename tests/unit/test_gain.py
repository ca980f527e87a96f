"""The forecast of what splitting gains: known machines and models come out on the right side."""

from __future__ import annotations

import pytest

from para_core.execution.gain import EAGER, WORTH, Work, gain, seconds
from para_core.sequence.mesh import Degrees, Link

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


@pytest.mark.parametrize(("slowest", "pays"), [(1.6e14, True), (1.2e14, True), (5e13, False)])
def test_splitting_with_a_slower_card_pays_while_its_share_takes_it_less_than_the_whole(slowest, pays):
    """All wait for it: shares are even."""
    assert (gain(FLUX, Degrees(ulysses=2), ADA, PCIE, slowest) > WORTH) is pays


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
