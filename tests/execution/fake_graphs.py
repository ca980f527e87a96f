"""CUDA graphs on the CPU: every operation between begin and end of a capture is recorded, and a replay runs them again.

As with the real ones, a replay reads and writes the very tensors of the capture, and nothing of Python between them is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from para_core.execution.graphs import capture_stream


class Recording(TorchDispatchMode):
    """Stays entered below every other mode; ``graph`` is the one that is being captured."""

    graph: Graph | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.graph is not None:
            self.graph.operations.append((func, args, kwargs or {}, out))
        return out


class Card:
    """What the process has captured. ``begun``, ``replayed``: parts so far. ``told``: what torch's allocator was told."""

    names = "_cuda_endAllocateToPool", "_cuda_releasePool"

    def __init__(self, recording: Recording):
        self.recording = recording
        self.begun = self.replayed = 0
        self.called_off = False
        self.alive: set[int] = set()
        self.told: list[str] = []
        self.streams = 0

    def stream(self, _device: int) -> Any:
        self.streams += 1
        return SimpleNamespace(wait_stream=lambda _other: None)


class Graph:
    """Stands for ``torch.cuda.CUDAGraph``."""

    card: Card

    def __init__(self) -> None:
        self.operations: list[tuple] = []
        self.card.alive.add(id(self))

    def __del__(self) -> None:
        self.card.alive.discard(id(self))

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert pool == "pool" and capture_error_mode == "thread_local"
        assert self.card.recording.graph is None, "one capture at a time"
        self.card.recording.graph = self
        self.card.begun += 1

    def capture_end(self) -> None:
        assert self.card.recording.graph is self
        self.card.recording.graph = None
        if self.card.called_off:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def replay(self) -> None:
        self.card.replayed += 1
        for func, args, kwargs, out in self.operations:
            for kept, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(kept, torch.Tensor):
                    kept.copy_(new)


@contextmanager
def installed() -> Iterator[Card]:
    """In place of torch's."""
    capture_stream.cache_clear()
    with pytest.MonkeyPatch.context() as patch, Recording() as recording:
        card = Card(recording)
        patch.setattr(torch.cuda, "CUDAGraph", type("CardGraph", (Graph,), {"card": card}))
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        patch.setattr(torch.cuda, "Stream", card.stream)
        patch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(wait_stream=lambda _other: None))
        patch.setattr(torch.cuda, "stream", lambda _stream: nullcontext())
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        for name in ("synchronize", "empty_cache"):
            patch.setattr(torch.cuda, name, lambda *_device: None)
        for name in card.names:
            patch.setattr(torch.cuda.memory, name, lambda _device, pool, name=name: card.told.append(f"{name} {pool}"))
        try:
            yield card
        finally:
            capture_stream.cache_clear()
