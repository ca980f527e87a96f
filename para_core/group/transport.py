"""What gloo and NCCL have in common: how they are called, how they fail, and how a wait for them ends."""

from __future__ import annotations

import contextlib
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any, Protocol, TypeVar

import torch

from ..stopwatch import Exchanged

Made = TypeVar("Made")

LOOK = 0.1  # seconds between looks at ``Life.check`` while a collective is pending
REMEDY = "NCCL_P2P_DISABLE=1 in the environment of ComfyUI has them go through the host's memory"
"""Said where GPUs do not reach each other's memory, though the driver says that they do."""


class CommunicationFailed(RuntimeError):
    """A peer died, hung, or aborted, or this rank did: the communicator is of no more use.

    absent: ranks of the joined communicator that did not come to a meeting.
    """

    def __init__(self, message: str, absent: Sequence[int] = ()):
        super().__init__(message)
        self.absent = tuple(absent)


class Transport(Protocol):
    """Collectives of one group of ranks. ``start_*`` return what ``finish`` waits for.

    Tensors are flat uint8 except for ``start_all_reduce``. Failures raise ``CommunicationFailed``, from ``check`` those that
    were noticed meanwhile. ``ahead``: beside what is computed until ``finish``. ``abort`` is for any thread and may be called again.
    """

    def start_all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, received_sizes: list[int], sent_sizes: list[int], *, ahead: bool = False
    ) -> Any: ...
    def start_all_reduce(self, tensor: torch.Tensor) -> Any: ...
    def start_broadcast(self, tensor: torch.Tensor, root: int) -> Any: ...
    def start_shift(self, sent: torch.Tensor, to: int, received: torch.Tensor, source: int) -> Any: ...
    def finish(self, work: Any) -> None: ...
    def check(self) -> None: ...
    def abort(self) -> None: ...
    def close(self) -> None: ...


class Life:
    """What a communicator and its subgroups share: whether it was aborted, what to look at while waiting, who counts, gloo's listener.

    done: collectives that this rank has finished (on CUDA: enqueued). waiting: it is in one.
    """

    def __init__(self) -> None:
        self.aborted = self.waiting = False
        self.done = 0
        self.on_wait: Callable[[], None] | None = None
        self.transports: list[Transport] = []
        self.exchanged: Exchanged | None = None
        self.gloo_device: Any = None

    def check(self) -> None:
        if self.aborted:
            raise CommunicationFailed("the communicator was aborted")
        if self.on_wait is not None:
            self.on_wait()


@contextlib.contextmanager
def failures() -> Iterator[None]:
    """Name gloo's errors as ours, without their source location and advice."""
    try:
        yield
    except CommunicationFailed:
        raise
    except RuntimeError as error:
        text = str(error).strip().splitlines() or ["the collective failed"]
        raise CommunicationFailed(re.sub(r"^\[[^]]*\] ", "", text[0]).partition(". This is typically")[0]) from error


def interruptible(make: Callable[[], Made], check: Callable[[], None], deadline: float = math.inf) -> Made:
    """``make()`` in a thread, which is left behind if ``check`` raises or the deadline (``time.monotonic``) passes."""
    made: Future[Made] = Future()

    def run() -> None:
        try:
            made.set_result(make())
        except BaseException as error:  # noqa: BLE001  the caller's, who would wait for ever
            made.set_exception(error)

    threading.Thread(target=run, name="paradit-connect", daemon=True).start()
    while not wait([made], timeout=LOOK).done:
        check()
        if time.monotonic() > deadline:
            raise CommunicationFailed("the ranks met, but did not connect in time")
    with failures():
        return made.result()
