"""Times are taken without waiting for the device, from its own clock where it has one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from para_core.cache.rule import Record
from para_core.comfy import meter as meter_module
from para_core.comfy.meter import Meter
from para_core.stopwatch import Stopwatch

CUDA = torch.device("cuda", 0)


class Device:
    """A GPU that works when it is waited for: every millisecond of work takes effect then."""

    def __init__(self) -> None:
        self.queued, self.waited, self.capturing = 0.0, 0, False


@pytest.fixture
def device(monkeypatch) -> Device:
    made = Device()

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing
            self.at: float | None = None

        def record(self, stream: Any) -> None:
            self.at = made.queued

        def synchronize(self) -> None:
            made.waited += 1

        def elapsed_time(self, other: Event) -> float:
            assert made.waited, "read before it was waited for"
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing)
    return made


def test_laps_on_cuda_are_the_devices_time_and_taking_them_waits_for_nothing(device):
    watch = Stopwatch(CUDA)
    for milliseconds in (3.0, 5.0):
        with watch.lap():
            device.queued += milliseconds
        device.queued += 100
    assert device.waited == 0 and len(watch) == 2
    assert watch.seconds() == pytest.approx([0.003, 0.005]) and watch.seconds(1) == pytest.approx([0.005])


def test_a_lap_that_fails_is_none(device):
    watch = Stopwatch(torch.device("cpu"))
    with pytest.raises(KeyError), watch.lap():
        raise KeyError
    assert len(watch) == 0


def step(meter: Meter, device: Device, sigma: float, exchange: float, compute: float, hit: bool = False, whole: bool = True) -> None:
    records: list[Record] = []
    with meter.visit(torch.tensor([sigma]), 1, records) as visit:
        with meter.exchanged.message(1000):
            device.queued += exchange
        device.queued += compute
        records.append(Record(sigma, (0.1,), hit))
        visit.whole = whole


def test_on_cuda_the_exchange_is_timed_after_the_first_step_until_two_were_computed(device):
    meter = Meter(CUDA)
    for number, (exchange, hit) in enumerate([(500.0, False), (1.0, True), (20.0, False), (40.0, False), (900.0, False)]):
        step(meter, device, 1 - number / 5, exchange, 60.0, hit)
    assert device.waited == 0
    found = meter.exchange()
    assert found["seconds"] == pytest.approx(0.061) and found["of_seconds"] == pytest.approx(0.061 + 0.18)
    assert found["share"] == pytest.approx(0.061 / 0.241, abs=1e-3) and found["bytes"] == 1000
    assert [entry["seconds"] for entry in meter.steps()] == pytest.approx([0.56, 0.061, 0.08, 0.1, 0.96])


def test_a_forward_whose_kernels_the_other_ranks_have_yet_to_load_is_not_timed(device):
    meter = Meter(CUDA)
    for number, exchange in enumerate((500.0, 900.0, 20.0)):
        meter.unsettled = number == 1
        step(meter, device, 1 - number / 3, exchange, 60.0)
    found = meter.exchange()
    assert found["seconds"] == pytest.approx(0.02) and found["of_seconds"] == pytest.approx(0.08)


def test_what_comes_before_the_first_step_is_added_up(device, monkeypatch):
    clock = iter([0.0, 2.0, 5.0, 5.5])
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: next(clock))
    meter = Meter(CUDA)
    with pytest.raises(OSError), meter.open("workers"):
        raise OSError
    with meter.open("workers"):
        pass
    assert meter.opening == {"workers": 2.5}


def test_steps_that_a_graph_replayed_tell_nothing_about_the_exchange(device):
    meter = Meter(CUDA)
    for number in range(4):
        device.capturing = number == 1
        step(meter, device, 1 - number / 4, 20.0, 60.0, whole=number == 0)
    assert meter.exchange() == {"bytes": 1000, "share": None, "seconds": 0, "of_seconds": 0}
    assert [entry["seconds"] for entry in meter.steps()] == pytest.approx([0.08] * 4), "their time is known all the same"
