"""Tables that stock code copies from the host: remembered by content in one forward, answered in the next."""

from __future__ import annotations

import pytest
import torch

from para_core.execution.constants import Constants

WAYS = {
    "device": lambda tensor: tensor.to("meta"),
    "device and type": lambda tensor: tensor.to(device="meta", dtype=torch.float16),
    "another's": lambda tensor: tensor.to(torch.empty(1, device="meta", dtype=torch.float64)),
    "in place": lambda tensor: torch.empty(tensor.shape, device="meta", dtype=tensor.dtype).copy_(tensor),
}


@pytest.mark.parametrize("inference", [True, False], ids=["inference", "grad"])
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_is_made_once_and_answered_from_then_on(way, inference):
    constants, tables = Constants("meta"), [torch.arange(5.0), torch.arange(3), torch.empty(0)]
    with torch.inference_mode(inference):
        with constants:
            first = [WAYS[way](table) for table in tables]
        assert len(constants.held) == 3
        constants.answering = True
        held = dict(constants.held)
        with constants:
            again = [WAYS[way](table.clone()) for table in tables]
        assert constants.held == held, "nothing was copied"
    assert [(one.shape, one.dtype, one.device) for one in again] == [(one.shape, one.dtype, one.device) for one in first]


def test_what_a_capture_may_read_stays_when_another_shape_is_warmed():
    constants, held = Constants("meta"), []
    for answering in (False, True, False, False):
        constants.answering = answering
        with constants:
            torch.arange(4).to("meta")
        held += constants.held.values()
    assert len(held) == 4 and all(one is held[0] for one in held)


def test_another_content_is_copied_after_all():
    constants = Constants("meta")
    with constants:
        torch.arange(4).to("meta")
        constants.answering = True
        torch.arange(4).mul(2).to("meta")
    assert len(constants.held) == 2


def test_an_answer_may_be_changed_in_place():
    constants = Constants("cpu")  # from the host to itself, so that contents can be seen
    with constants:
        torch.arange(3.0).to("cpu", torch.float64).add_(1)
        constants.answering = True
        torch.arange(3.0).to("cpu", torch.float64).add_(1)
        assert torch.equal(torch.arange(3.0).to("cpu", torch.float64), torch.arange(3.0, dtype=torch.float64))


def test_everything_else_passes_and_a_pause_lets_all_pass():
    constants = Constants("meta")
    with constants:
        assert torch.equal(torch.ones(3).to(torch.float64) + 1, torch.full((3,), 2.0, dtype=torch.float64))
        with constants.paused():
            torch.arange(2).to("meta")
            assert torch.compile(lambda x: x + 1, backend="eager", fullgraph=True)(torch.ones(2)).sum() == 4
        torch.ones(1).to("meta")
    with constants.paused():
        torch.arange(2).to("meta")
    assert len(constants.held) == 1
