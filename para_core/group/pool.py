"""Worker processes: started through torch's own launcher, one life each, in one private directory."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from .channel import Channel, call
from .launch import key_file

if TYPE_CHECKING:  # some builds of torch, such as that for AMD on Windows, have no torch.distributed
    from torch.distributed.elastic.multiprocessing import PContext

# Seconds until a killed process must be gone. One in an uninterruptible driver call can take longer; it is left then.
_KILLED = 10

# A socket's path may have about 104 characters, some of which the file's name needs.
_MAX_DIRECTORY = 80


class WorkerProcess:
    """One process of the pool. Made by ``Pool.start``."""

    def __init__(self, name: str, directory: Path, script: Path, environment: Mapping[str, str]):
        self.name = name
        self.socket_path = directory / f"{name}.sock"
        self._authkey = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._exit_code: int | None = None
        file = key_file(self.socket_path)
        file.touch(mode=0o600)
        file.write_text(json.dumps({"authkey": self._authkey.hex(), "parent": os.getpid()}))
        self._context = _start(script, self.socket_path, environment, directory / f"{name}.log")
        self.pid = self._context.pids()[0]

    def alive(self) -> bool:
        """Whether the process runs; reaps it if it has ended. Never blocks."""
        return self.exit_code() is None

    def exit_code(self) -> int | None:
        """None while it runs; negative if a signal ended it."""
        with self._lock, _quiet():
            if self._exit_code is None:
                result = self._context.wait(0)
                if result is not None:
                    failure = result.failures.get(0)
                    self._exit_code = 0 if failure is None else failure.exitcode
            return self._exit_code

    def open_channel(self, timeout_s: float) -> Channel:
        """Reach the worker. Raises ``ChannelClosed``, at once if it ends meanwhile. Possible once."""
        return call(self.socket_path, self._authkey, self.alive, timeout_s)

    def tail(self, lines: int = 20) -> str:
        """The last lines it printed, error output last."""
        kept: list[str] = []
        for path in (self._context.stdouts[0], self._context.stderrs[0]):
            with contextlib.suppress(OSError):
                kept += Path(path).read_text(errors="replace").splitlines()[-lines:]
        return "\n".join(kept[-lines:])

    def kill(self) -> None:
        """End it at once, stopped or hung as it may be, and reap it. Its log can be read until the pool stops."""
        with self._lock, _quiet():
            self._context.close(death_sig=signal.SIGKILL, timeout=_KILLED)
        self.exit_code()
        for path in (self.socket_path, key_file(self.socket_path)):
            path.unlink(missing_ok=True)


class Pool:
    """The processes beside ComfyUI's own, and the directory (mode 0700) of their sockets, stores and logs.

    script: what they run, with the path of their socket as the only argument. environment: variables for them, beside those
    of this process. Stopped at the interpreter's exit; if this process is killed instead, the workers remove the directory.
    """

    def __init__(self, script: Path, environment: Mapping[str, str] | None = None):
        self.workers: list[WorkerProcess] = []
        self._script = script
        # Unbuffered: the last lines before a crash are the ones to show.
        self._environment = {"PYTHONUNBUFFERED": "1", **(environment or {})}
        self._directory: Path | None = None
        self._count = 0

    @property
    def directory(self) -> Path:
        """Made at first use."""
        if self._directory is None:
            self._directory = _make_directory()
            atexit.register(self.stop)
        return self._directory

    def start(self) -> WorkerProcess:
        """Start one more worker (milliseconds; it is ready once its channel opens)."""
        self._count += 1
        worker = WorkerProcess(f"worker{self._count}", self.directory, self._script, self._environment)
        self.workers.append(worker)
        return worker

    def end(self, worker: WorkerProcess) -> None:
        """Kill one worker and forget it."""
        worker.kill()
        if worker in self.workers:
            self.workers.remove(worker)

    def stop(self) -> None:
        """End every worker and remove the directory. The pool can be used again."""
        while self.workers:
            self.end(self.workers[-1])
        if self._directory is not None:
            atexit.unregister(self.stop)
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None


def _make_directory() -> Path:
    parent = tempfile.gettempdir()
    if len(parent) > _MAX_DIRECTORY and os.path.isdir("/tmp"):
        parent = "/tmp"
    return Path(tempfile.mkdtemp(prefix="paradit-", dir=parent))


def _start(script: Path, socket_path: Path, environment: Mapping[str, str], log_directory: Path) -> PContext:
    """Start the one process of a context of its own, so that no failure ends another's life."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, PContext, Std, start_processes

    logging.getLogger(PContext.__module__).addFilter(_filter)

    def start() -> PContext:
        with _quiet():
            return start_processes(
                name="paradit",
                entrypoint=sys.executable,
                args={0: (str(script), str(socket_path))},
                envs={0: dict(environment)},
                logs_specs=DefaultLogsSpecs(log_dir=str(log_directory), redirects=Std.ALL),
            )

    # On the main thread the launcher would replace ComfyUI's signal handlers, Ctrl-C's among them.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="paradit-start") as executor:
        return executor.submit(start).result()


class _QuietHere(logging.Filter):
    """Drops what the launcher logs about our own starts and kills (signal handlers, exit codes), on our threads only."""

    def __init__(self) -> None:
        super().__init__()
        self.here = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(self.here, "active", False)


_filter = _QuietHere()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = getattr(_filter.here, "active", False)
    _filter.here.active = True
    try:
        yield
    finally:
        _filter.here.active = before
