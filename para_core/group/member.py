"""Rank 0's view of one worker: how to reach it, what it holds, and what became of it."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .channel import Channel, ChannelClosed
from .pool import WorkerProcess

_REAPED = 1.0  # seconds between a process's last words on its channel and its exit code
_LONGEST = 240  # characters of a worker's line or error that a sentence may quote


class RankLost(RuntimeError):
    """A rank died, hung or failed while others depended on it: a clause that says which, how, and its last line."""


@dataclass(frozen=True)
class Held:
    """A model on a worker. ``state`` names its weights ("": as in its file); ``changed``: the layers that are not as in its file.

    ``opened``: the worker has opened the file itself, because its device cannot hold the model.
    """

    state: str
    changed: frozenset[str]
    opened: bool = False


@dataclass(eq=False)
class Member:
    """One sidecar. ``ready``: it has imported what it needs. ``heard``: when it last said something, by the monotonic clock.
    ``greeting``: the thread that reaches it, see ``greet``; ``unreached``: why that did not succeed.

    ``models``: what it holds, by model id. ``rates``: operations a second of its device's matrix products, where it was asked.
    ``progress``: a mark that changes while its main thread gets on, ``moved``: when it last did; ``waits``: that thread waits
    for other ranks.
    """

    rank: int
    device: str
    process: WorkerProcess
    channel: Channel | None = None
    ready: bool = False
    heard: float = 0.0
    replies: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    models: dict[int, Held] = field(default_factory=dict)
    rates: dict[torch.dtype, float] = field(default_factory=dict)
    progress: Any = None
    moved: float = 0.0
    waits: bool = False
    greeting: threading.Thread | None = None
    unreached: str = ""
    _over: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def greet(self, hello: dict[str, Any], timeout: float, then: Callable[[], None]) -> None:
        """Reach the worker and tell it ``hello``, in a thread: it imports ComfyUI and readies its device while rank 0 loads the model.

        ``then`` is called when there is a channel to listen to.
        """

        def reach() -> None:
            try:
                channel = self.process.open_channel(timeout)
                channel.tell("hello", hello)
            except ChannelClosed as error:
                self.unreached = str(error)
                return
            with self._lock:
                self.channel = channel
                if self._over:
                    channel.close()
            then()

        self.greeting = threading.Thread(target=reach, name="paradit-greet", daemon=True)
        self.greeting.start()

    def beat(self, sign: dict[str, Any]) -> None:
        """A sign of life, with what it says of the main thread."""
        if sign["progress"] != self.progress:
            self.progress, self.moved = sign["progress"], self.heard
        self.waits = sign["waiting"]

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.device}"

    @property
    def reachable(self) -> bool:
        return self.channel is not None and not self.channel.closed

    def waiting(self) -> bool:
        """Whether it has said something that nobody has heard yet, or its channel has closed."""
        return self.channel is None or self.channel.waiting()

    def tell(self, kind: str, payload: Any = None) -> None:
        """Raises RankLost if the worker has gone."""
        assert self.channel is not None
        try:
            self.channel.tell(kind, payload)
        except ChannelClosed as error:
            raise RankLost(f"{self} {self.fate()}") from error

    def urge(self, kind: str, payload: Any) -> None:
        """``tell`` for the watch thread: a worker that has gone, or to which another thread is talking, is left alone."""
        if self.channel is not None:
            try:
                self.channel.tell(kind, payload, wait=False)
            except ChannelClosed:
                return

    def end(self) -> None:
        """At once, whatever it does. Threads that talk to it are let go first."""
        with self._lock:
            self._over = True
            if self.channel is not None:
                self.channel.close()
        self.process.kill()

    def fate(self) -> str:
        """How a worker ended that has closed its channel, with its last line."""
        deadline = time.monotonic() + _REAPED
        while (code := self.process.exit_code()) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if code is None:
            return f"closed its channel{self.last_line()}"
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}{self.last_line()}"
        return f"ended by itself with code {code}{self.last_line()}"

    def last_line(self) -> str:
        """The last line it printed, as the end of a clause: an indented one is source code, of a warning or a traceback."""
        lines = [line for line in self.process.tail(20).splitlines() if line.strip() and not line.startswith(" ")]
        line = lines[-1].strip() if lines else ""
        return f' (its last line: "{line[:_LONGEST]}")' if line else ""


def one_line(error: BaseException) -> str:
    """An error's type and what it says first, without a full stop."""
    said = str(error).strip().partition("\n")[0][:_LONGEST].rstrip(". ")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
