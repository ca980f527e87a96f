"""The private line between rank 0 and one worker: JSON and raw tensors over a local socket that only this user can open.

The worker listens and rank 0 calls, so that rank 0 never waits in ``accept`` for a process that has died.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch

from .codec import as_bytes, decode, dtype_named, encode
from .launch import key_file

_FAMILY = "AF_UNIX"
_RETRY = 0.05  # seconds between attempts to reach a worker that is still importing torch


class ChannelClosed(RuntimeError):
    """The other end has closed the channel or died, or could not be reached."""


class Channel:
    """Messages of a kind and a payload (see ``codec``) in both directions, in order.

    ``tell`` may be called from any thread. It blocks while the other end does not read and the socket's buffer (about
    200 KiB) is full: ending the other process frees it.
    """

    def __init__(self, connection: Connection):
        self._connection = connection
        self._telling = threading.Lock()
        self._hearing = threading.Lock()

    @property
    def closed(self) -> bool:
        """Whether this end has been closed."""
        return self._connection.closed

    def fileno(self) -> int:
        """For ``multiprocessing.connection.wait`` and ``select``."""
        return self._connection.fileno()

    def waiting(self) -> bool:
        """Whether there is something to hear, the end included."""
        try:
            return self._connection.poll(0)
        except OSError:
            return True

    def tell(self, kind: str, payload: Any = None, *, wait: bool = True) -> None:
        """Pass one message. Raises ``Untransportable`` (nothing was passed then) or ``ChannelClosed``.

        wait: if False, and another thread is in the middle of a message, nothing is passed.
        """
        header, tensors = encode(payload)
        message = json.dumps({"kind": kind, "payload": header}).encode()
        raw = [as_bytes(tensor).cpu() for tensor in tensors if tensor.numel()]
        if not self._telling.acquire(blocking=wait):
            return
        try:
            self._connection.send_bytes(message)
            for data in raw:
                self._connection.send_bytes(data.numpy().data)
        except OSError as error:
            raise ChannelClosed(f"the channel closed while passing {kind!r}") from error
        finally:
            self._telling.release()

    def hear(self, timeout_s: float | None = None) -> tuple[str, Any]:
        """The next message's kind and payload, its tensors on the CPU.

        Raises ``TimeoutError`` if none has begun within ``timeout_s`` (None waits for ever), ``ChannelClosed`` at the end.
        """
        try:
            with self._hearing:
                if timeout_s is not None and not self._connection.poll(timeout_s):
                    raise TimeoutError(f"nothing was heard for {timeout_s:g} s")
                message = json.loads(self._connection.recv_bytes())
                tensors = [self._hear_tensor(record) for record in json.loads(message["payload"])["tensors"]]
        except TimeoutError:
            raise
        except (EOFError, OSError) as error:
            raise ChannelClosed("the channel closed") from error
        return message["kind"], decode(message["payload"], tensors)

    def _hear_tensor(self, record: dict[str, Any]) -> torch.Tensor:
        tensor = torch.empty(record["shape"], dtype=dtype_named(record["dtype"]))
        if tensor.numel():
            self._connection.recv_bytes_into(as_bytes(tensor).numpy().data)
        return tensor

    def close(self) -> None:
        """End the channel in both directions: whoever waits in ``tell`` or ``hear``, here or there, gets ``ChannelClosed``."""
        if self._connection.closed:
            return
        # Closing alone would leave a thread of this process waiting, and the other end with it.
        with contextlib.suppress(OSError), socket.fromfd(self._connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as end:
            end.shutdown(socket.SHUT_RDWR)
        with self._telling, self._hearing:
            self._connection.close()


def answer(socket_path: str | Path) -> Channel:
    """The worker's side: wait for rank 0's call on ``socket_path``.

    Reads and removes the key that the pool left, and the socket once rank 0 has called, so that nobody calls again.
    """
    file = key_file(socket_path)
    authkey = bytes.fromhex(json.loads(file.read_text())["authkey"])
    with Listener(str(socket_path), family=_FAMILY, authkey=authkey) as listener:
        file.unlink()
        while True:
            try:
                return Channel(listener.accept())
            except (AuthenticationError, EOFError, ConnectionError):
                continue


def call(socket_path: str | Path, authkey: bytes, alive: Callable[[], bool], timeout_s: float) -> Channel:
    """Rank 0's side: reach the worker that listens on ``socket_path``, or will.

    Raises ``ChannelClosed`` once ``alive`` says that it has ended, or after ``timeout_s``.
    """
    reached: list[Connection] = []
    given_up = threading.Event()

    def reach() -> None:
        while not given_up.is_set():
            try:
                connection = Client(str(socket_path), family=_FAMILY, authkey=authkey)
            except (OSError, EOFError, AuthenticationError):
                given_up.wait(_RETRY)
                continue
            reached.append(connection)
            return

    # In a thread of its own: a worker that is stopped between listening and accepting would hold its caller.
    caller = threading.Thread(target=reach, name="paradit-call", daemon=True)
    caller.start()
    deadline = time.monotonic() + timeout_s
    while caller.is_alive() and time.monotonic() < deadline and alive():
        caller.join(_RETRY)
    given_up.set()
    if reached:
        return Channel(reached[0])
    if not alive():
        raise ChannelClosed("the worker ended before it answered")
    raise ChannelClosed(f"the worker did not answer within {timeout_s:g} s")
