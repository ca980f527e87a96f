"""Ranks as threads: a communicator without processes, for tests of what is exchanged."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from para_core.sequence.mesh import Mesh

T = TypeVar("T")
TIMEOUT = 10.0


class FakeComm:
    """One rank of a group of threads. A rank that waits longer than ``TIMEOUT`` for the others raises ``RuntimeError``."""

    def __init__(self, rank: int, size: int, board: dict[str, Any]) -> None:
        self.rank, self.size, self._board = rank, size, board

    def _swap(self, value: Any) -> list[Any]:
        """Give ``value`` to all ranks; return what each rank gave."""
        slots: list[Any] = self._board["slots"]
        barrier: threading.Barrier = self._board["barrier"]
        slots[self.rank] = value
        self._wait(barrier)
        values = list(slots)
        self._wait(barrier)
        return values

    @staticmethod
    def _wait(barrier: threading.Barrier) -> None:
        try:
            barrier.wait(TIMEOUT)
        except threading.BrokenBarrierError:
            raise RuntimeError("a rank did not join the collective") from None

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor, received_sizes: Sequence[int], sent_sizes: Sequence[int]) -> None:
        assert sent.is_contiguous() and received.is_contiguous()
        assert sent.numel() == sum(sent_sizes) and received.numel() == sum(received_sizes)
        given = self._swap(sent.clone().flatten().split(list(sent_sizes)))
        for source, (target, pieces) in enumerate(zip(received.flatten().split(list(received_sizes)), given, strict=True)):
            piece = pieces[self.rank]
            if source == self.rank and (target.numel() == 0 or piece.numel() == 0):
                continue
            assert piece.numel() == target.numel(), "sender and receiver disagree about sizes"
            target.copy_(piece)

    def start_all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, received_sizes: Sequence[int], sent_sizes: Sequence[int]
    ) -> Callable[[], None]:
        """Done at once, but shown only to those who wait: until then ``received`` holds NaN (or 255) where others' pieces go."""
        arrived = received.clone()
        self.all_to_all(arrived, sent, received_sizes, sent_sizes)
        places = [pair for pair in zip(*(tensor.flatten().split(list(received_sizes)) for tensor in (received, arrived)), strict=True)]
        for source, (place, _) in enumerate(places):
            if source != self.rank:
                place.fill_(float("nan") if place.dtype.is_floating_point else 255)

        def wait() -> None:
            for place, piece in places:
                place.copy_(piece)

        return wait

    def all_reduce(self, tensor: torch.Tensor) -> None:
        tensor.copy_(torch.stack(self._swap(tensor.clone())).sum(0))

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> None:
        tensor.copy_(self._swap(tensor.clone())[root])

    def settle(self, timeout_s: float | None = None) -> None:
        pass

    def shift(self, sent: torch.Tensor, to: int, received: torch.Tensor, source: int) -> Callable[[], None]:
        assert sent.is_contiguous() and received.is_contiguous()
        if sent.numel():
            self._board["mail"][self.rank, to].put(sent.clone())

        def wait() -> None:
            if received.numel():
                try:
                    block = self._board["mail"][source, self.rank].get(timeout=TIMEOUT)
                except queue.Empty:
                    raise RuntimeError(f"rank {source} sent nothing") from None
                received.copy_(block)

        return wait


@dataclass
class Recorder:
    """A communicator that notes what is sent and what is waited for."""

    comm: FakeComm
    events: list[str]

    def __post_init__(self) -> None:
        self.rank, self.size = self.comm.rank, self.comm.size

    def all_to_all(self, *given: Any) -> None:
        self.events.append("all_to_all")
        self.comm.all_to_all(*given)

    def start_all_to_all(self, *given: Any) -> Callable[[], None]:
        return self._noted("start", "wait", self.comm.start_all_to_all(*given))

    def shift(self, *given: Any) -> Callable[[], None]:
        return self._noted("send", "receive", self.comm.shift(*given))

    def _noted(self, sent: str, waited: str, wait: Callable[[], None]) -> Callable[[], None]:
        number = sum(event.startswith(sent) for event in self.events)
        self.events.append(f"{sent} {number}")

        def noted() -> None:
            self.events.append(f"{waited} {number}")
            wait()

        return noted


def fake_comms(size: int) -> list[FakeComm]:
    """One communicator per rank of a new group."""
    board = {
        "slots": [None] * size,
        "barrier": threading.Barrier(size),
        "mail": {(a, b): queue.Queue() for a in range(size) for b in range(size)},
    }
    return [FakeComm(rank, size, board) for rank in range(size)]


def fake_meshes(ring: int, ulysses: int) -> list[Mesh]:
    """One mesh per rank, Ulysses neighbours next to each other."""
    sequence = fake_comms(ring * ulysses)
    inner = [fake_comms(ulysses) for _ in range(ring)]
    outer = [fake_comms(ring) for _ in range(ulysses)]
    return [
        Mesh(sequence[rank], inner[rank // ulysses][rank % ulysses], outer[rank % ulysses][rank // ulysses])
        for rank in range(ring * ulysses)
    ]


def on_ranks(size: int, work: Callable[[int], T], comms: Sequence[FakeComm] = ()) -> list[T]:
    """Run ``work(rank)`` in one thread per rank; return the results, or raise the first rank's own error."""
    results: list[Any] = [None] * size
    errors: list[BaseException | None] = [None] * size

    def body(rank: int) -> None:
        try:
            with torch.inference_mode():
                results[rank] = work(rank)
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            errors[rank] = error
            for comm in comms:
                comm._board["barrier"].abort()

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    raised = [error for error in errors if error is not None]
    if raised:
        raise next((error for error in raised if "did not join" not in str(error)), raised[0])
    return results
