"""A thread that listens to the workers, so that rank 0 learns of a loss while it computes or waits."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any, Protocol

from ..log import log
from .member import Member


class Watched(Protocol):
    """What the thread needs of the group. The methods are called on it, and must not wait for the group's other thread."""

    @property
    def members(self) -> list[Member]: ...

    def silence(self) -> float | None:
        """Seconds a member may be silent now; None: as long as it likes."""

    def pause(self) -> float:
        """Seconds until ``tend`` is due again."""

    def hear(self, member: Member, kind: str, payload: Any) -> None:
        """A member said something other than that it lives."""

    def lose(self, member: Member, what: str) -> None:
        """A member has ended or fallen silent."""

    def tend(self) -> None:
        """Housekeeping."""


class Watch:
    """Starts with the first ``wake`` and lasts as long as the process, asleep while there is nobody to listen to."""

    def __init__(self, group: Watched):
        self._group = group
        self._woken, self._waker = Pipe(duplex=False)
        self._started = threading.Lock()

    def wake(self) -> None:
        """Look at the present members and deadlines. For any thread, finalizers included."""
        if self._started.acquire(blocking=False):  # never released: once
            threading.Thread(target=self._run, name="paradit-watch", daemon=True).start()
        self._waker.send_bytes(b"w")

    def _run(self) -> None:
        while True:
            try:
                self._look()
            except Exception:  # noqa: BLE001  nothing else would notice a loss if this thread ended
                log.exception("the watch over the workers stumbled")
                time.sleep(1.0)

    def _look(self) -> None:
        members = {}
        for member in list(self._group.members):
            if member.channel is not None and member.reachable:
                try:
                    members[member.channel.fileno()] = member
                except OSError:  # closed between the two lines
                    continue
        try:
            ready = wait([self._woken, *members], timeout=self._group.pause() if self._group.members else None)
        except OSError:  # a channel was closed meanwhile
            return
        for item in ready:
            if item is self._woken:
                self._woken.recv_bytes()
            elif isinstance(item, int):
                self._hear(members[item])
        limit = self._group.silence()
        for member in members.values():
            # What lies unread counts as a sign of life: it may be this process that was stopped.
            if limit is not None and time.monotonic() - member.heard > limit and not member.waiting():
                self._group.lose(member, f"gave no sign of life for {limit:g} s{member.last_line()}")
        self._group.tend()

    def _hear(self, member: Member) -> None:
        assert member.channel is not None
        try:
            kind, payload = member.channel.hear()
        except Exception:  # noqa: BLE001  closed, or garbage: no more is to be expected of it
            self._group.lose(member, member.fate())
            return
        member.heard = time.monotonic()
        if kind == "beat":
            member.beat(payload)
        else:
            self._group.hear(member, kind, payload)


def next_of(member: Member, kind: str, timeout: float, check: Callable[[], None]) -> Any:
    """The payload of the member's next answer of ``kind``; others are late ones to what nobody waits for any more.

    check: called every 50 ms; what it raises ends the wait. Raises TimeoutError.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            found, payload = member.replies.get(timeout=0.05)
        except queue.Empty:
            check()
            if time.monotonic() > deadline:
                raise TimeoutError from None
            continue
        if found == kind:
            return payload
