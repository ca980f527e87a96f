"""A worker for tests: does what it is told over its channel. Run as a script with the path of its socket."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[3]))

from para_core.group import launch  # noqa: E402


def main(socket_path: str) -> None:
    parent, directory = launch.parent_of(socket_path), Path(socket_path).parent
    launch.watch_parent(parent, directory)
    if os.environ.get("STUB") == "crash":
        raise SystemExit("no such card")

    from para_core.group.channel import ChannelClosed, answer

    channel = answer(socket_path)
    while True:
        try:
            kind, payload = channel.hear()
        except ChannelClosed:
            launch.leave(parent, directory)
        if kind == "echo":
            channel.tell("echo", payload)
        elif kind == "print":
            print(payload)
            print(payload.upper(), file=sys.stderr)
            channel.tell("printed")
        elif kind == "deaf":
            time.sleep(3600)
        elif kind == "raise":
            raise RuntimeError(payload)


if __name__ == "__main__":
    main(sys.argv[1])
