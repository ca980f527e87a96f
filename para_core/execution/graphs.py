"""CUDA graphs of whole forwards: captured once per shape and run, replayed with new inputs.

A replay launches every kernel and every collective of a forward at once. Python's launch time, which keeps two GPUs from
being twice as fast as one, is then paid once per shape instead of once per step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..log import log

LIMIT = 4  # captures alive at once; each holds the activations of its shape
WARM = 1  # forwards of a shape before it is captured: libraries initialise and kernels are compiled in them

Forward = Callable[..., torch.Tensor | None]


@dataclass
class Capture:
    graph: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]
    output: torch.Tensor | None


class Graphs:
    """Captures of one model on one rank during one sampling run.

    Tensors among a call's arguments are copied in before every replay; every other argument, and ``context``, is part of
    a capture's identity. Ranks capture and replay independently: a capture sends nothing, and a replay sends what an
    ordinary forward would, so one that cannot capture still fits the others.
    """

    def __init__(self) -> None:
        self.captures: OrderedDict[Hashable, Capture] = OrderedDict()
        self.replays = 0
        self.failure: str | None = None
        self._seen: dict[Hashable, int] = {}
        self._pool: Any = None

    def run(self, call: Forward, args: tuple, kwargs: dict[str, Any], *context: Hashable) -> torch.Tensor | None:
        """``call(*args, **kwargs)``, by replay where a call like this one has been captured."""
        leaves, tree = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if self.failure is not None or not all(tensor.is_cuda for tensor in tensors):
            return call(*args, **kwargs)
        rest = tuple((tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        key = (str(tree), rest, context)
        capture = self.captures.get(key)
        if capture is None:
            self._seen[key] = self._seen.get(key, 0) + 1
            if self._seen[key] <= WARM:
                return call(*args, **kwargs)
            try:
                capture = self._capture(key, call, leaves, tree)
            except RuntimeError as error:
                self.failure = str(error).splitlines()[0]
                log.warning("this run goes on without CUDA graphs: %s", self.failure)
                torch.cuda.synchronize()
                return call(*args, **kwargs)
        self.captures.move_to_end(key)
        for static, tensor in zip(capture.inputs, tensors, strict=True):
            static.copy_(tensor)
        capture.graph.replay()
        self.replays += 1
        return None if capture.output is None else capture.output.clone()

    def _capture(self, key: Hashable, call: Forward, leaves: list[Any], tree: Any) -> Capture:
        while len(self.captures) >= LIMIT:
            self.captures.popitem(last=False)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        leaves = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(leaves, tree)
        graph = torch.cuda.CUDAGraph()
        # other threads (watchdogs, previews) may use CUDA meanwhile: only this thread is held to the rules of a capture
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = call(*args, **kwargs)
        self.captures[key] = Capture(graph, [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)], output)
        return self.captures[key]

    def drop(self) -> None:
        """Forget every capture and free what they hold."""
        self.captures.clear()
        self._seen.clear()
        self._pool = None
