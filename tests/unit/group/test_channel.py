"""The channel: whole messages in order, or ChannelClosed; nobody waits for the dead."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Listener
from pathlib import Path

import pytest
import torch

from para_core.group.channel import Channel, ChannelClosed, answer, call
from para_core.group.codec import Untransportable
from para_core.group.launch import key_file

KEY = b"0123456789abcdef"


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    path = tmp_path / "line.sock"
    key_file(path).write_text(json.dumps({"authkey": KEY.hex(), "parent": os.getpid()}))
    return path


@pytest.fixture
def ends(socket_path: Path) -> Iterator[tuple[Channel, Channel]]:
    """Rank 0's end and the worker's."""
    answered: list[Channel] = []
    worker = threading.Thread(target=lambda: answered.append(answer(socket_path)))
    worker.start()
    rank0 = call(socket_path, KEY, lambda: True, 10)
    worker.join()
    yield rank0, answered[0]
    rank0.close()
    answered[0].close()


def test_messages_arrive_whole_and_in_order_in_both_directions(ends: tuple[Channel, Channel]) -> None:
    for here, there in (ends, ends[::-1]):
        tensors = [torch.arange(7, dtype=torch.bfloat16), torch.empty(0, 3), torch.tensor(True), torch.arange(12.0).reshape(3, 4).t()]
        here.tell("first", {"tensors": tensors, "n": float("inf")})
        here.tell("second")
        kind, payload = there.hear(5)
        assert kind == "first" and payload["n"] == float("inf")
        for arrived, sent in zip(payload["tensors"], tensors, strict=True):
            assert arrived.dtype == sent.dtype and torch.equal(arrived, sent)
        assert there.hear(5) == ("second", None)


def test_messages_of_many_threads_do_not_mix(ends: tuple[Channel, Channel]) -> None:
    rank0, worker = ends

    def tell(thread: int) -> None:
        for number in range(20):
            rank0.tell("block", [thread, number, torch.full((20_000,), thread)])

    threads = [threading.Thread(target=tell, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    heard: dict[int, list[int]] = {thread: [] for thread in range(4)}
    for _ in range(80):
        _, (thread, number, block) = worker.hear(10)
        assert torch.equal(block, torch.full((20_000,), thread))
        heard[thread].append(number)
    assert all(numbers == list(range(20)) for numbers in heard.values())


def test_what_cannot_be_passed_leaves_the_channel_usable(ends: tuple[Channel, Channel]) -> None:
    rank0, worker = ends
    with pytest.raises(Untransportable):
        rank0.tell("bad", {"tensor": torch.zeros(3), "patch": print})
    rank0.tell("good")
    assert worker.hear(5)[0] == "good"


def test_the_end_of_one_side_is_heard_after_its_last_message(ends: tuple[Channel, Channel]) -> None:
    rank0, worker = ends
    worker.tell("last")
    worker.close()
    worker.close()
    assert worker.closed
    assert rank0.hear(5)[0] == "last"
    with pytest.raises(ChannelClosed):
        rank0.hear(5)
    with pytest.raises(ChannelClosed):
        for _ in range(10):
            rank0.tell("into the void")
    with pytest.raises(ChannelClosed):
        worker.hear(5)


def test_closing_ends_every_wait_on_both_sides(ends: tuple[Channel, Channel]) -> None:
    rank0, worker = ends
    ended: list[str] = []

    def wait(name: str, channel: Channel) -> None:
        with pytest.raises(ChannelClosed):
            while True:
                channel.hear() if name.startswith("hears") else channel.tell("much", torch.zeros(1_000_000))
        ended.append(name)

    threads = [
        threading.Thread(target=wait, args=arguments) for arguments in (("hears there", worker), ("hears here", rank0), ("tells", rank0))
    ]
    threads[1].start()
    threads[2].start()
    time.sleep(0.3)  # now the telling thread is stuck: nobody hears at the other end
    rank0.close()
    threads[0].start()
    for thread in threads:
        thread.join(5)
    assert sorted(ended) == ["hears here", "hears there", "tells"]


def test_hearing_nothing_times_out_and_loses_nothing(ends: tuple[Channel, Channel]) -> None:
    rank0, worker = ends
    with pytest.raises(TimeoutError):
        rank0.hear(0.05)
    worker.tell("late")
    assert rank0.hear(5)[0] == "late"


def test_a_dead_worker_is_not_waited_for(socket_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(ChannelClosed, match="ended before it answered"):
        call(socket_path, KEY, lambda: time.monotonic() < begin + 0.2, 30)
    assert time.monotonic() < begin + 2


def test_a_worker_that_never_listens_is_given_up(socket_path: Path) -> None:
    with pytest.raises(ChannelClosed, match="did not answer within 0.3 s"):
        call(socket_path, KEY, lambda: True, 0.3)


def test_a_worker_that_stops_before_it_accepts_is_given_up(socket_path: Path) -> None:
    with Listener(str(socket_path), family="AF_UNIX", authkey=KEY):
        with pytest.raises(ChannelClosed, match="did not answer within 0.3 s"):
            call(socket_path, KEY, lambda: True, 0.3)


def test_a_caller_without_the_key_is_refused_and_the_right_one_served(socket_path: Path) -> None:
    answered: list[Channel] = []
    worker = threading.Thread(target=lambda: answered.append(answer(socket_path)))
    worker.start()
    with pytest.raises(ChannelClosed):
        call(socket_path, b"another key", lambda: True, 0.5)
    assert not answered
    rank0 = call(socket_path, KEY, lambda: True, 10)
    worker.join()
    answered[0].tell("hello")
    assert rank0.hear(5)[0] == "hello"
    rank0.close()
    answered[0].close()


def test_once_answered_neither_key_nor_socket_is_left(ends: tuple[Channel, Channel], socket_path: Path) -> None:
    assert not socket_path.exists() and not key_file(socket_path).exists()
