"""Several model calls at once, although stock code makes them one after the other.

When conditions cannot share a batch (prompts of different lengths, say), ComfyUI calls the model once for each. To run
them on different ranks at the same time, every group of conditions gets a *lane*: a thread that runs stock code up to
its model call, hands the call over and waits. Only one lane (or the step they share) ever runs at a moment, in a
fixed order, so stock code and other packs see nothing unusual.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from typing import Any

import comfy.samplers
import torch


class Call:
    """One call of the diffusion model: positional and keyword arguments as stock code passed them."""

    def __init__(self, args: tuple, kwargs: dict[str, Any]):
        self.args, self.kwargs = args, kwargs


class _Stopped(BaseException):
    """Unwinds a lane whose neighbour failed."""


class _Lane:
    def __init__(self, function: Callable[[], Any]):
        self.call: Call | None = None
        self.answer: Any = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.stopped = False
        self.go, self.paused = threading.Semaphore(0), threading.Semaphore(0)
        context, inference = contextvars.copy_context(), torch.is_inference_mode_enabled()
        device = torch.cuda.current_device() if torch.cuda.is_available() and torch.cuda.is_initialized() else None

        def run() -> None:
            self.go.acquire()
            try:
                if device is not None:
                    torch.cuda.set_device(device)
                if not self.stopped:
                    with torch.inference_mode(inference):
                        self.result = context.run(function)
            except BaseException as error:  # noqa: BLE001  handed to the thread that runs the lanes, whatever it is
                self.error = error
            self.call = None
            self.done = True
            self.paused.release()

        self.done = False
        self.thread = threading.Thread(target=run, name="paradit-lane", daemon=True)
        self.thread.start()

    def resume(self) -> None:
        """Let the lane run until its next call or its end."""
        self.go.release()
        self.paused.acquire()

    def ask(self, call: Call) -> Any:
        """In the lane: hand ``call`` over and wait for its answer."""
        if self.stopped:
            raise _Stopped
        self.call = call
        self.paused.release()
        self.go.acquire()
        if self.stopped:
            raise _Stopped
        return self.answer


class Lanes:
    """Runs functions in lanes, ``width`` of their calls at a time."""

    def __init__(self) -> None:
        self._by_thread: dict[int, _Lane] = {}

    def current(self) -> _Lane | None:
        """The lane this thread is, if any."""
        return self._by_thread.get(threading.get_ident())

    def run(self, functions: Sequence[Callable[[], Any]], step: Callable[[list[Call]], list[Any]], width: int) -> list[Any]:
        """Results of ``functions``; their model calls go to ``step`` together. Re-raises the first error of a lane."""
        lanes = [_Lane(function) for function in functions]
        self._by_thread = {lane.thread.ident: lane for lane in lanes if lane.thread.ident is not None}
        try:
            for lane in lanes:
                lane.resume()
                self._check(lane)
            while True:
                waiting = [lane for lane in lanes if lane.call is not None][:width]
                if not waiting:
                    return [lane.result for lane in lanes]
                answers = step([lane.call for lane in waiting if lane.call is not None])
                for lane, answer in zip(waiting, answers, strict=True):
                    lane.call, lane.answer = None, answer
                    lane.resume()
                    self._check(lane)
        finally:
            for lane in lanes:
                lane.stopped = True
                while not lane.done:
                    lane.resume()
                lane.thread.join()
            self._by_thread = {}

    @staticmethod
    def _check(lane: _Lane) -> None:
        if lane.error is not None:
            raise lane.error


def separate(conds: list, x_in: torch.Tensor, timestep: torch.Tensor) -> list[list[int]]:
    """Indices of the conditions that run now, grouped by what ComfyUI would put into one batch.

    A default counts, too: whether it runs depends on the others of its index alone, which are in its group.
    """
    groups: list[tuple[list[int], list]] = []
    for index, entries in enumerate(conds):
        active = [comfy.samplers.get_area_and_mult(entry, x_in, timestep) for entry in entries or ()]
        active = [entry for entry in active if entry is not None]
        if not active:
            continue
        merged, apart = ([index], active), []
        for indices, others in groups:
            if any(comfy.samplers.can_concat_cond(one, other) for one in active for other in others):
                merged = (indices + merged[0], others + merged[1])
            else:
                apart.append((indices, others))
        groups = [*apart, merged]
    return [sorted(indices) for indices, _ in groups]
