"""Several measurements on one machine: getting ready is done side by side, what is timed has the machine to itself.

Processes that joined the same folder take turns by two locked files (flock), which a process leaves free however it ends. Whoever
wants to be alone goes before those that want to go on getting ready: else each would wait for the other's next compilation. One
that hangs holds the others up for ``PATIENCE`` seconds; then they go on as if it were not there, and say so.
"""

from __future__ import annotations

import fcntl
import functools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

PATIENCE = 120.0


class Turns:
    """One process's part in the turns of ``folder``: beside others from now on, and ``alone`` where it asks for it.

    disturbed: how often it went on though others did not make way, or took so long that others may have.
    """

    def __init__(self, folder: Path, patience: float = PATIENCE):
        folder.mkdir(parents=True, exist_ok=True)
        self._asked: IO[str] = (folder / "asked").open("w")  # shared: somebody wants to be alone, or is
        self._used: IO[str] = (folder / "used").open("w")  # shared: somebody gets ready; exclusive: somebody is alone
        self._alone, self._patience, self.disturbed = False, patience, 0
        self.share()

    def share(self) -> None:
        self._lock(self._asked, fcntl.LOCK_EX)
        self._lock(self._used, fcntl.LOCK_SH)
        fcntl.flock(self._asked, fcntl.LOCK_UN)

    def _lock(self, file: IO[str], how: int) -> None:
        deadline = time.monotonic() + self._patience
        while True:
            try:
                fcntl.flock(file, how | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self.disturbed += 1
                    print("turns: somebody did not make way", file=sys.stderr, flush=True)
                    return
                time.sleep(0.02)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until all others wait or have ended. Inside of itself it changes nothing."""
        if self._alone:
            yield
            return
        fcntl.flock(self._used, fcntl.LOCK_UN)
        self._lock(self._asked, fcntl.LOCK_SH)
        self._lock(self._used, fcntl.LOCK_EX)
        self._alone, began = True, time.monotonic()
        try:
            yield
        finally:
            self._alone = False
            self.disturbed += time.monotonic() - began > self._patience  # others may have gone on
            fcntl.flock(self._used, fcntl.LOCK_UN)
            fcntl.flock(self._asked, fcntl.LOCK_UN)
            self.share()


joined: Turns | None = None


def join(folder: Path) -> None:
    """This process takes turns with others from now on. What the library measures while it gets ready is timed alone, too."""
    from para_core.attention.choice import Chooser
    from para_core.execution import gain
    from para_core.group.group import Group

    global joined
    joined = Turns(folder)
    Chooser.measure = by_itself(Chooser.measure)  # type: ignore[method-assign]
    Group.link = by_itself(Group.link, known=lambda group: group._link is not None)  # type: ignore[method-assign]
    Group.rates = by_itself(Group.rates)  # type: ignore[method-assign]
    gain.matrix_rate = functools.cache(by_itself(gain.matrix_rate))  # type: ignore[assignment]
    gain.memory_rate = functools.cache(by_itself(gain.memory_rate))  # type: ignore[assignment]


def by_itself(function: Callable[..., Any], known: Callable[..., bool] = lambda *_: False) -> Callable[..., Any]:
    """``function``, called alone unless its result is ``known``."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if known(*args):
            return function(*args, **kwargs)
        with alone():
            return function(*args, **kwargs)

    return called


@contextmanager
def alone() -> Iterator[None]:
    """Alone, where this process has joined others."""
    if joined is None:
        yield
    else:
        with joined.alone():
            yield
