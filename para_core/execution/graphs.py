"""CUDA graphs of whole forwards: captured once per shape and run, replayed with new inputs.

A replay launches every kernel and every collective of a forward at once. Python's launch time, which keeps two GPUs from
being twice as fast as one, is then paid once per shape instead of once per step.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from textwrap import shorten
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ..attention.capture import abandon
from ..cache.first_block import FirstBlockCache
from .constants import Constants

SEAM = 2
"""After so many attention calls a section goes on in a graph of its own, which is launched while the first one runs: before a
forward, and where the cache decides, the processor may have waited until the device had nothing left to do."""
LIMIT = 4  # captures alive at once; each holds the activations of its shape
WARM = 1  # forwards of a shape before it is captured: libraries initialise and kernels are compiled in them

Forward = Callable[..., Any]  # a tensor, a list of them, or None


@dataclass
class Capture:
    """A captured forward: the graphs of each of its sections, the tensors to fill before a replay, and the one to read after it.

    Without a cache there is one section. With a cache there are three (to the first block's output, the rest of the stack, what
    follows) and ``taps``: the streams before and after the first block and at the last block's output.
    """

    sections: list[list[torch.cuda.CUDAGraph]]
    inputs: list[torch.Tensor]
    taps: list[list[torch.Tensor]]
    output: Any = None

    def replay(self, cache: FirstBlockCache | None) -> None:
        if cache is None or cache.step is None:
            launch(itertools.chain.from_iterable(self.sections))
            return
        first, rest, after = self.sections
        launch(first)
        cache.observe(cache.step, self.taps[0], self.taps[1])
        if not cache.hit:
            launch(rest)
        cache.finish(cache.step, self.taps[2])
        launch(after)


def launch(graphs: Iterable[torch.cuda.CUDAGraph]) -> None:
    for graph in graphs:
        graph.replay()


class Recorder:
    """Captures a forward, beginning a new section at each tap of the cache."""

    def __init__(self, pool: Any):
        self.sections: list[list[torch.cuda.CUDAGraph]] = []
        self.taps: list[list[torch.Tensor]] = []
        self._pool = pool
        self._calls = 0

    def begin(self) -> None:
        self.sections.append([])
        self._calls = 0
        self._next()

    def end(self) -> None:
        self.sections[-1][-1].capture_end()

    def abandon(self) -> None:
        abandon(self.sections[-1][-1], self._pool)

    def attended(self) -> None:
        """The forward has made another attention call, and nothing of it is under way."""
        self._calls += 1
        if self._calls == SEAM:
            self.end()
            self._next()

    def after_first(self, before: list[torch.Tensor], after: list[torch.Tensor]) -> None:
        self.taps += [before, after]
        self.end()
        self.begin()

    def after_last(self, streams: list[torch.Tensor]) -> None:
        self.taps.append(streams)
        self.end()
        self.begin()

    def _next(self) -> None:
        self.sections[-1].append(torch.cuda.CUDAGraph())
        # other threads (watchdogs, previews) may use CUDA meanwhile: only this thread is held to the rules of a capture
        self.sections[-1][-1].capture_begin(pool=self._pool, capture_error_mode="thread_local")


@lru_cache
def capture_stream(device: int) -> torch.cuda.Stream:
    """The stream that captures on ``device`` are made on: one for all, because cuBLAS keeps 32 MiB for each that it has seen."""
    return torch.cuda.Stream(device)


class Graphs:
    """Captures of one model on one rank during one sampling run.

    Tensors among a call's arguments are copied in before every replay; every other argument, and ``context``, is part of
    a capture's identity. Ranks capture and replay independently: a capture sends nothing, and a replay sends what an
    ordinary forward would, so one that cannot capture still fits the others. NCCL promises that only where all capture; its
    messages are the same all the same, unless they go straight from captured buffers (see ``group.communicator``).
    """

    def __init__(self, say: Callable[[str], None], device_type: str = "cuda") -> None:
        self._say = say
        self._device_type = device_type
        self.constants = Constants()
        self.captures: OrderedDict[Hashable, Capture] = OrderedDict()
        self.replays = 0
        self.failure: str | None = None
        self._seen: dict[Hashable, int] = {}
        self._gone: set[Hashable] = set()
        """Calls whose capture had to make way. They run as they are: shapes in turn would else be captured anew every time."""
        self._pool: Any = None
        self._recorder: Recorder | None = None  # of the forward that is being captured

    def attended(self) -> None:
        """See ``Recorder``."""
        if self._recorder is not None:
            self._recorder.attended()

    def run(
        self, call: Forward, args: tuple, kwargs: dict[str, Any], *context: Hashable, cache: FirstBlockCache | None = None
    ) -> Any:
        """``call(*args, **kwargs)``, by replay where a call like this one has been captured; a hit of ``cache`` skips a part."""
        leaves, tree = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if self.failure is not None or any(tensor.device.type != self._device_type for tensor in tensors):
            return call(*args, **kwargs)
        rest = tuple((tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        key = (str(tree), rest, context, cache is None)
        capture = self.captures.get(key)
        if capture is None:
            self._seen[key] = self._seen.get(key, 0) + 1
            if self._seen[key] <= WARM or key in self._gone:
                with self.constants:
                    return call(*args, **kwargs)
            failure = None
            try:
                capture = self._capture(key, call, leaves, tree, cache)
            except RuntimeError as error:
                failure = shorten(next(iter(str(error).splitlines()), type(error).__name__), 120, placeholder=" ...")
            if failure is not None:  # out here, the error's frames no longer hold the memory of what was captured
                return self._uncaptured(failure, call, args, kwargs)
        assert capture is not None
        self.captures.move_to_end(key)
        for static, tensor in zip(capture.inputs, tensors, strict=True):
            static.copy_(tensor)
        capture.replay(cache)
        self.replays += 1
        return tree_map_only(torch.Tensor, torch.clone, capture.output)

    def _capture(self, key: Hashable, call: Forward, leaves: list[Any], tree: Any, cache: FirstBlockCache | None) -> Capture:
        while len(self.captures) >= LIMIT:
            self._gone.add(self.captures.popitem(last=False)[0])
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        leaves = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(leaves, tree)
        recorder = Recorder(self._pool)
        stream = capture_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            try:
                recorder.begin()
                self.constants.answering = True
                self._recorder = recorder
                if cache is not None:
                    cache.tap = recorder
                with self.constants:
                    output = call(*args, **kwargs)
                recorder.end()
            except BaseException:
                recorder.abandon()
                raise
            finally:
                self.constants.answering, self._recorder = False, None
                if cache is not None:
                    cache.tap = None
        torch.cuda.current_stream().wait_stream(stream)
        inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self.captures[key] = Capture(recorder.sections, inputs, recorder.taps, output)
        return self.captures[key]

    def _uncaptured(self, failure: str, call: Forward, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The call as it is, and no more captures in this run: unless it fails as well, which then was not the capture's fault."""
        self.drop()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        result = call(*args, **kwargs)
        self.failure = failure
        self._say(f"This run goes on without CUDA graphs: {failure}")
        return result

    def drop(self) -> None:
        """Forget every capture and free what they hold."""
        self.captures.clear()
        self._seen.clear()
        self._gone.clear()
        self.constants.held.clear()
        self._pool = None
