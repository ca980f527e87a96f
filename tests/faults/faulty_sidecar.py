"""A sidecar that fails where a test says: a script for workers, beside the real one.

The file that $FAULT names holds {"rank": 1, "at": place, "after": times, "how": what}. It is removed when the fault happens,
so each happens once; $FAULT with ".at" added then holds the time. Places: exchange (an attention exchange), capture (one that
becomes part of a CUDA graph), replay (of a CUDA graph, just launched), there and back (an MLP that is computed while attention's
messages travel), join, receive (weights), patch.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.remove(str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from para_core import sidecar  # noqa: E402
from para_core.execution.graphs import Capture  # noqa: E402
from para_core.execution.parallel_mlp import Mlp  # noqa: E402
from para_core.group.communicator import Communicator  # noqa: E402
from para_core.group.worker import Worker  # noqa: E402

ORDER = Path(os.environ["FAULT"])
state = {"rank": 0, "receiving": False, "seen": 0}


def reached(place: str) -> None:
    if not ORDER.exists():
        state["seen"] = 0
        return
    order = json.loads(ORDER.read_text())
    if (order["rank"], order["at"]) != (state["rank"], place):
        return
    state["seen"] += 1
    if state["seen"] <= order.get("after", 0):
        return
    ORDER.unlink()
    ORDER.with_name(f"{ORDER.name}.at").write_text(str(time.time()))
    if order["how"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if order["how"] == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if order["how"] == "hang":
        time.sleep(600)  # the main thread alone
    if order["how"] == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore about it")
    if order["how"] == "huge":
        torch.empty(2**60)  # the allocator's own error
    raise ValueError("the kernel did not like these numbers")


replay, there, back, all_to_all, broadcast, on_join, on_model, on_patches = (
    Capture.replay,
    Mlp.there,
    Mlp.back,
    Communicator._all_to_all,
    Communicator.broadcast,
    Worker.on_join,
    Worker.on_model,
    Worker.on_patches,
)


def exchange(self, *args, **options):
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    reached("capture" if capturing else "exchange")
    return all_to_all(self, *args, **options)


def launch(self, cache):
    replay(self, cache)
    reached("replay")


def beside(place, original):
    def launch(self):
        reached(place)
        original(self)

    return launch


def join(self, order):
    state["rank"] = order["rank"]
    reached("join")
    return on_join(self, order)


def model(self, order):
    state["receiving"] = True
    try:
        return on_model(self, order)
    finally:
        state["receiving"] = False


def receive(self, tensor, root=0):
    if state["receiving"]:
        reached("receive")
    return broadcast(self, tensor, root)


def patches(self, order):
    reached("patch")
    return on_patches(self, order)


Capture.replay = launch
Mlp.there, Mlp.back = beside("there", there), beside("back", back)
Communicator._all_to_all = exchange
Communicator.broadcast = receive
Worker.on_join = join
Worker.on_model = model
Worker.on_patches = patches

sidecar.main(sys.argv[1])
