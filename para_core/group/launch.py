"""How a worker process notices that ComfyUI has gone.

This file needs the standard library alone, so that a parent's death is noticed while torch is still being imported.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

# Seconds between looks at the parent. The end of the channel says it sooner; this covers a worker that does not listen.
_POLL = 0.5

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

# Seconds that a dying parent may need between closing its files and handing its children on.
_REAPED = 2.0

# Seconds after which a directory that cannot be removed is left.
_REMOVED = 1.0

_vanishing = threading.Lock()


def key_file(socket_path: str | Path) -> Path:
    """Where the pool leaves ``{"authkey": hex, "parent": pid}`` for the worker, readable by this user alone."""
    return Path(f"{socket_path}.key")


def parent_of(socket_path: str | Path) -> int:
    """Process id of rank 0, as the pool wrote it down. Raises OSError if the pool has gone and taken its directory along."""
    return json.loads(key_file(socket_path).read_text())["parent"]


def watch_parent(parent: int, directory: Path) -> None:
    """From now on, end this process within a second of its parent's end, and remove ``directory``."""
    if sys.platform == "linux":
        # A stopped process sees nothing: have the kernel let it go on when its parent ends.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGCONT), 0, 0, 0)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL)
        _vanish(directory)

    threading.Thread(target=watch, name="paradit-parent", daemon=True).start()


def leave(parent: int, directory: Path) -> None:
    """End this process at once, whatever its threads do: for a worker whose channel has closed.

    If rank 0 has died, ``directory`` goes too: there is nobody else to remove it.
    """
    deadline = time.monotonic() + _REAPED
    while os.getppid() == parent and time.monotonic() < deadline:
        time.sleep(0.02)
    if os.getppid() != parent:
        _vanish(directory)
    os._exit(0)


def _vanish(directory: Path) -> None:
    # Siblings do the same at the same moment, each tolerating what the others have removed already. In one process only one
    # thread does it: the other's exit would cut it short.
    with _vanishing:
        deadline = time.monotonic() + _REMOVED
        while directory.exists() and time.monotonic() < deadline:
            shutil.rmtree(directory, ignore_errors=True)
            time.sleep(0.01)
        os._exit(0)
