"""The faults that ``faults.py`` tries: which they are, where a worker has its own, and how rank 0 fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

SILENCE = 4.0  # seconds without a sign of life after which a worker counts as hung
KILLED, HUNG, FULL = "was ended by SIGKILL", f"gave no sign of life for {SILENCE:g} s", "OutOfMemoryError"
WITHOUT = "goes on without CUDA graphs"
FORWARDS = {"first": 0, "capture": 1, "later": 3}  # before the one that fails, where no graph is


@dataclass(frozen=True)
class Fault:
    """``who`` fails ``how`` at a stage: compiling, first (step), capture (or the second step), later (a replay, where there is one).

    ``outcome``: how the prompt must end. ``words``: what its sentence must say.
    """

    who: str
    how: str
    stage: str
    outcome: str
    words: str = ""

    @property
    def name(self) -> str:
        return f"{self.who} {self.how}, {self.stage}"


def faults(*, graph: bool, compiled: bool) -> list[Fault]:
    """Those of a case whose forwards are captured, or whose blocks are compiled: the first on a group that has computed nothing yet."""
    stages = ["first", "capture", "later"] if graph else ["first", "later"]
    killed = ["compiling", "capture"] if compiled else stages  # a worker that starts anew also compiles anew
    found = [Fault("worker", "killed", stage, "alone", KILLED) for stage in killed]
    found += [Fault("worker", "stopped", stage, "alone", HUNG) for stage in (stages[-1:] if compiled else stages[-2:])]
    full = {"capture": ("shared", f"{WITHOUT}: CUDA out of memory")}
    found += [Fault("worker", "memory", stage, *full.get(stage, ("alone", FULL))) for stage in stages]
    found += [Fault("rank 0", "cancelled", stage, "cancelled") for stage in stages]
    found += [Fault("rank 0", "memory", stage, "alone", f"rank 0 failed: {FULL}") for stage in ("first", "later") if not graph]
    if graph:
        found += [Fault("rank 0", how, "capture", "shared", WITHOUT) for how in ("memory", "really full", "refused")]
        found += [Fault("one rank", how, "capture", outcome) for how, outcome in (("cancelled", "cancelled"), ("refused", "shared"))]
    return found


def order(fault: Fault, messages: int, *, graph: bool) -> dict[str, Any]:
    """What tells the faulty sidecar when to fail. ``messages``: exchanges of a forward."""
    how = {"killed": "kill", "stopped": "stop"}.get(fault.how, fault.how)
    if graph and fault.stage != "first":
        place, after = ("capture", 3) if fault.stage == "capture" else ("replay", 1)
    else:
        place, after = "exchange", 3 + messages * FORWARDS[fault.stage]
    return {"rank": 1, "at": place, "after": after, "how": how}


@contextmanager
def failing(fault: Fault, calls: int, at: list[float], *, graph: bool) -> Iterator[None]:
    """Rank 0 fails, or is told to stop, once; ``at`` gets the time. ``calls``: of attention in a forward."""
    import comfy.model_management
    import torch

    from para_core.execution.graphs import Capture
    from para_core.execution.runner import AttentionOverride

    replay, compute, call, seen = Capture.replay, AttentionOverride.compute, AttentionOverride.__call__, 0

    def fail() -> None:
        at.append(time.time())
        if fault.how == "cancelled":
            comfy.model_management.interrupt_current_processing(True)
        if fault.how == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        if fault.how == "refused":
            torch.cuda.current_stream().synchronize()
        if fault.how == "really full":
            there = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**24) / there)

    def passed() -> None:
        nonlocal seen
        now = not graph or torch.cuda.is_current_stream_capturing() == (fault.stage == "capture")
        seen += now
        if now and not at and seen > 2 + (0 if graph else calls * FORWARDS[fault.stage]):
            fail()

    def replayed(capture: Any, cache: Any) -> None:
        nonlocal seen
        replay(capture, cache)
        seen += 1
        if seen == 2 and fault.stage == "later":
            fail()

    def attending(function: Callable) -> Callable:
        def attended(*args: Any, **kwargs: Any) -> Any:
            if not (graph and fault.stage == "later"):
                passed()
            return function(*args, **kwargs)

        return attended

    with ExitStack() as stack:
        stack.enter_context(patch.object(Capture, "replay", replayed))
        stack.enter_context(patch.object(AttentionOverride, "__call__", attending(call)))
        stack.enter_context(patch.object(AttentionOverride, "compute", attending(compute)))
        yield
    if fault.how == "really full":
        torch.cuda.set_per_process_memory_fraction(1.0)
