"""Waiting for what a device has been given, with events in place of a device's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from para_core.group.communicator import CommunicationFailed, Communicator
from para_core.group.transport import Life


class Reached:
    """The end of what a device does, as an event: reached at the third look."""

    def __init__(self, then: Callable[[], None] = lambda: None):
        self.looks, self._then = 0, then

    def query(self) -> bool:
        self.looks += 1
        if self.looks == 3:
            self._then()
        return self.looks >= 3


def test_what_an_abort_has_ended_is_not_taken_for_done() -> None:
    def devices() -> Communicator:
        return Communicator(0, (0, 1), torch.device("cuda"), None, 60.0, Life())

    reached: Any = Reached()
    devices().settle(reached=reached)
    assert reached.looks == 3
    comm = devices()
    ended: Any = Reached(comm.abort)
    with pytest.raises(CommunicationFailed, match="aborted"):
        comm.settle(reached=ended)
    assert ended.looks == 3
