"""The worker's own decisions, with the program behind it faked."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from para_core.group import worker as module
from para_core.group.channel import ChannelClosed
from para_core.group.communicator import CommunicationFailed
from para_core.group.worker import Worker

GIB = 2**30


class FakeHost:
    """Models of one GiB each on a device of ``total`` bytes. ``files``: those that were opened."""

    def __init__(self, total: int):
        self.total, self.worker = total, None
        self.files: list[str] = []

    def open_file(self, origin: dict, device: torch.device) -> str:
        self.files.append(f"model {origin['number']}")
        return self.files[-1]

    def load(self, model: str, patches: list, options: dict) -> None:
        assert model in self.files

    def opened(self, model: str) -> int | None:
        return GIB if model in self.files else None

    def build(self, recipe: dict, device: torch.device) -> str:
        return f"model {recipe['number']}"

    def fill(self, model: str, tensors: dict) -> None:
        assert model.startswith("model")

    def ready(self, model: str, options: dict) -> None:
        assert options == {"of": "rank 0"}

    def free_memory(self, device: torch.device) -> int:
        return self.total - GIB * len(self.worker._models)

    def matrix_rate(self, device: torch.device, dtype: str) -> float:
        return {"bfloat16": 7e14}[dtype]

    def begin(self, model: Any, run: dict) -> Any:
        return None


class FakeChannel:
    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def tell(self, kind: str, payload: Any = None) -> None:
        self.told.append((kind, payload))


@pytest.fixture
def worker(monkeypatch):
    monkeypatch.setattr(module, "receive", lambda manifest, comm, device: [({}, 3), ({}, 4)])
    host, channel = FakeHost(total=int(3.3 * GIB)), FakeChannel()
    found = Worker(channel, host, torch.device("cpu"), lambda: None)
    found._comm = object()
    host.worker = found
    return found


def load(worker: Worker, number: int) -> list[int]:
    """Models that made room for this one."""
    order = {"id": number, "recipe": {"number": number}, "manifest": [], "size": GIB, "options": {"of": "rank 0"}}
    worker.channel.told.clear()
    worker.on_model(order)
    assert worker.channel.told[-1] == ("loaded", 7)
    return dropped(worker)


def dropped(worker: Worker) -> list[int]:
    """Models that rank 0 was told of, in the last call."""
    return [payload for kind, payload in worker.channel.told if kind == "dropped"]


def test_models_stay_while_they_fit(worker):
    assert [load(worker, number) for number in (1, 2, 3)] == [[], [], []]
    assert list(worker._models) == [1, 2, 3]


def test_the_least_recently_used_model_makes_room_and_rank_0_is_told(worker):
    for number in (1, 2, 3):
        load(worker, number)
    worker.on_begin({"model": 1})
    assert load(worker, 4) == [2]
    assert list(worker._models) == [3, 1, 4]


def test_a_model_that_is_here_already_drops_none(worker):
    for number in (1, 2, 3):
        load(worker, number)
    assert load(worker, 1) == []
    assert list(worker._models) == [1, 2, 3]


def test_a_model_too_large_for_the_device_drops_all_others_and_is_tried(worker):
    load(worker, 1)
    worker.host.total = GIB // 2
    assert load(worker, 2) == [1]
    assert list(worker._models) == [2]


def room(worker: Worker, number: int, working: float) -> tuple[bool, list[int]]:
    """Whether this one would fit, with so many GiB to compute in, and what went for it."""
    worker.channel.told.clear()
    worker.on_room({"id": number, "size": GIB, "working": int(working * GIB)})
    kind, fits = worker.channel.told[-1]
    assert kind == "room"
    return fits, dropped(worker)


def test_a_model_needs_room_to_be_computed_with(worker):
    assert room(worker, 1, 2.0) == (True, []) and room(worker, 1, 2.5) == (False, [])
    assert not worker._models, "it was only asked"


def test_for_a_model_that_is_here_others_go_until_it_can_be_computed_with(worker):
    """Else every prompt's first step would run out of memory, and the next prompt's again."""
    for number in (1, 2, 3):
        load(worker, number)
    assert room(worker, 1, 0.2) == (True, [])
    assert room(worker, 2, 1.0) == (True, [1]) and list(worker._models) == [2, 3]
    assert room(worker, 2, 2.5) == (False, [3]) and list(worker._models) == [2]


def opened(worker: Worker, number: int, size: int) -> list[int]:
    """What went for a file of so many GiB."""
    worker.channel.told.clear()
    worker.on_open({"id": number, "origin": {"number": number}, "patches": [], "options": {}, "size": size * GIB})
    assert worker.channel.told[-1] == ("opened", None)
    return dropped(worker)


def test_a_file_is_opened_where_models_that_were_sent_have_made_room(worker):
    """ComfyUI knows nothing of those, and would fetch weights in every step."""
    for number in (1, 2):
        load(worker, number)
    assert opened(worker, 3, 2) == [1]
    assert opened(worker, 4, 9) == [2] and list(worker._models) == [3, 4], "it makes room for its own itself"
    assert opened(worker, 4, 9) == []


def test_rank_0_knows_what_was_dropped_for_a_file_that_cannot_be_opened(worker):
    load(worker, 1)
    worker.host.open_file = None
    with pytest.raises(TypeError):
        opened(worker, 2, 9)
    assert dropped(worker) == [1] and not worker._models


def test_of_a_file_that_is_open_what_is_on_the_device_counts_as_room(worker):
    opened(worker, 1, 1)
    assert room(worker, 1, 2.2) == (True, []) and room(worker, 1, 2.4) == (False, [])


@pytest.mark.parametrize(("kind", "payload"), [("end", None), ("drop", 1)])
def test_memory_goes_back_with_a_run_and_with_a_model(worker, monkeypatch, kind, payload):
    """Else torch keeps what it computed in, and more of it with every new size."""
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(worker._runner is None))
    load(worker, 1)
    worker.device, worker._runner, worker.host.end = torch.device("cuda", 1), object(), lambda runner: None
    getattr(worker, f"on_{kind}")(payload)
    assert emptied == [kind == "end"]


def test_it_says_how_fast_its_device_is(worker):
    worker.on_rate("bfloat16")
    assert worker.channel.told == [("rate", 7e14)]


def test_a_failure_that_nobody_hears_of_any_more_ends_the_process_at_once(worker):
    """Rank 0's death is first seen as a collective that fails: its report must not take the main thread, and so the process, down
    before the directory of both has been removed."""

    class Left(Exception):
        pass

    def tell(kind: str, payload: Any = None) -> None:
        if kind == "failed":
            raise ChannelClosed("rank 0 has gone")

    def leave() -> None:
        raise Left

    def fail(payload: Any) -> None:
        raise CommunicationFailed("peer closed the connection")

    worker.channel.tell, worker.channel.hear, worker._leave = tell, threading.Event().wait, leave
    worker.on_step = fail
    worker._orders.put(("step", None))
    with pytest.raises(Left):
        worker.serve()


def test_a_failed_worker_drops_its_run_before_it_closes_its_communicator(worker):
    """NCCL closes a communicator when no CUDA graph of the run holds it any more."""
    events: list[str] = []

    class Comm:
        def abort(self) -> None:
            events.append("abort")

        def close(self) -> None:
            events.append("close")

    def fail(payload: Any) -> None:
        raise ValueError("no")

    worker._comm, worker._runner, worker.on_step = Comm(), "run", fail
    worker.host.end = lambda _runner: events.append("end")
    worker._answer("step", None)
    assert [kind for kind, _ in worker.channel.told] == ["failed"]
    assert events[:2] == ["abort", "end"] and events[-1] == "close"
