"""The First Block Cache on a stack: compares the first block's residual, and skips the blocks after it on a hit.

Blocks are skipped by replacing ``forward`` on the instances (``remove()`` deletes the replacement), inside the cutting
hooks, so that the stock loop, its hooks and its joins run as ever. On a hit each block hands its tokens on, and the
last one returns first block's output + residual of the rest: whatever the loop added in between (ControlNet
residuals) is part of that residual already and is overwritten, not counted twice.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..plans.plan import Blocks, parameters
from ..sequence.cut import Cut
from ..sequence.hooks import Arguments, Hooks
from ..sequence.mesh import Comm
from ..sequence.replace import replace
from ..sequence.solo import SOLO
from .predictor import History
from .rule import change, decide


@dataclass(frozen=True)
class Chunk:
    """Rows of this rank's forward that belong to one condition; ``index``: its place among the step's conditions."""

    key: Hashable
    index: int
    start: int
    stop: int


def chunks(keys: Sequence[Hashable], rows: int, start: int, stop: int, offset: int = 0) -> tuple[Chunk, ...]:
    """The conditions in batch rows ``start:stop`` of a forward that has ``rows`` rows for each of ``keys``.

    ``offset``: conditions of the step that come before this forward's.
    """
    found = []
    for index, key in enumerate(keys):
        low, high = max(index * rows, start), min((index + 1) * rows, stop)
        if low < high:
            found.append(Chunk(key, offset + index, low - start, high - start))
    return tuple(found)


@dataclass(frozen=True)
class Step:
    """What rank 0 says about the cache before a forward. ``chunks``: this rank's; ``count``: conditions of the whole step."""

    sigma: float
    threshold: float
    chunks: tuple[Chunk, ...]
    count: int
    compare: bool
    may_hit: bool
    order: int


@dataclass
class Entry:
    first: torch.Tensor
    rest: History


class Tap(Protocol):
    """Someone who records a forward in three parts (a graph capture) and will call ``observe`` and ``finish`` later."""

    def after_first(self, before: torch.Tensor, after: torch.Tensor) -> None: ...
    def after_last(self, stream: torch.Tensor) -> None: ...


class FirstBlockCache:
    """Per process and sampling run. ``comm``: every rank of the step; one of them alone needs no collective.

    ``begin`` a step before a forward and read ``hit`` and ``changes`` (per condition of the step) after it.
    """

    def __init__(self, hooks: Hooks):
        self.hooks = hooks
        self.step: Step | None = None
        self.comm: Comm | None = None
        self.tap: Tap | None = None
        self.hit = False
        self.changes: tuple[float, ...] = ()
        self._entries: dict[Hashable, Entry] = {}
        self._first: torch.Tensor | None = None
        self._undo: list[Callable[[], None]] = []
        flat = [(spec, block) for spec, blocks in hooks.stacks for block in blocks]
        for index, (spec, block) in enumerate(flat):
            wrap = self._first_block if index == 0 else self._later_block
            forward = wrap(spec, block.forward, parameters(block), index == len(flat) - 1)
            self._undo.append(replace(block, "forward", forward))

    def begin(self, step: Step | None, comm: Comm | None = None) -> None:
        self.step, self.comm = step, comm
        self.hit, self.changes = False, ()

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()
        self.forget()

    def forget(self) -> None:
        """Cold start: drop every stored residual."""
        self._entries.clear()
        self._first = None

    def _stream(self, spec: Blocks, output, cut: Cut) -> torch.Tensor:
        """This rank's rows of the plan's stream in a block's output."""
        outputs = [output] if isinstance(output, torch.Tensor) else output
        stream = self.hooks.plan.stream
        index = next(index for index, segments in enumerate(spec.returns) if stream in segments)
        return cut.part(outputs[index], spec.returns[index], stream)

    def _first_block(self, spec: Blocks, original: Callable, names: list[str], _last: bool) -> Callable:
        argument = next(name for name, segments in spec.tokens.items() if segments == (self.hooks.plan.stream,))

        def forward(*args, **kwargs):
            step, running = self.step, self.hooks.forward
            if step is None or running is None:
                return original(*args, **kwargs)
            before = Arguments(names, args, kwargs).get(argument).clone()  # the block may write into it
            output = original(*args, **kwargs)
            after = self._stream(spec, output, running.cut)
            if self.tap is not None:
                self.tap.after_first(before, after)
            else:
                self.observe(step, before, after)
            return output

        return forward

    def observe(self, step: Step, before: torch.Tensor, after: torch.Tensor) -> None:
        """Compare what the first block added, and decide. Stream rows (B, S_local, C) before and after the block."""
        residual = after - before
        self._first = after.clone()
        self.hit = self._decide(step, residual)
        if not self.hit:
            for chunk in step.chunks:
                self._entry(chunk.key, step.order).first = residual[chunk.start : chunk.stop]

    def finish(self, step: Step, stream: torch.Tensor) -> None:
        """At the last block's output: predict the stream in place on a hit, remember what the rest added otherwise."""
        first, self._first = self._first, None
        if first is None:
            return
        if self.hit:
            for chunk in step.chunks:
                first[chunk.start : chunk.stop] += self._entries[chunk.key].rest.predict(step.sigma)
            stream.copy_(first)
            return
        rest = stream - first
        for chunk in step.chunks:
            self._entry(chunk.key, step.order).rest.add(step.sigma, rest[chunk.start : chunk.stop])

    def _later_block(self, spec: Blocks, original: Callable, names: list[str], last: bool) -> Callable:
        def forward(*args, **kwargs):
            step, running = self.step, self.hooks.forward
            if step is None or running is None:
                return original(*args, **kwargs)
            output = self._hand_on(spec, Arguments(names, args, kwargs)) if self.hit else original(*args, **kwargs)
            if last and self.tap is not None:
                self.tap.after_last(self._stream(spec, output, running.cut))
            elif last:
                self.finish(step, self._stream(spec, output, running.cut))
            return output

        return forward

    def _entry(self, key: Hashable, order: int) -> Entry:
        if key not in self._entries:
            self._entries[key] = Entry(torch.empty(0), History(order))
        return self._entries[key]

    def _complete(self, key: Hashable) -> bool:
        """False where a patch kept the last block from running, so that nothing is known of the rest."""
        return key in self._entries and bool(self._entries[key].rest.points)

    def _decide(self, step: Step, residual: torch.Tensor) -> bool:
        """Reduce the sums over all ranks once; rank 0 decides and all follow."""
        comm = self.comm or SOLO
        if not step.compare or comm.size == 1 and not all(self._complete(chunk.key) for chunk in step.chunks):
            for chunk in step.chunks:
                self._entries.pop(chunk.key, None)
            return False
        sums = torch.zeros(step.count, 2, dtype=torch.float64, device=residual.device)
        for chunk in step.chunks:
            previous = self._entries[chunk.key].first
            sums[chunk.index, 0] += (previous - residual[chunk.start : chunk.stop]).abs().sum(dtype=torch.float32)
            sums[chunk.index, 1] += previous.abs().sum(dtype=torch.float32)
        comm.all_reduce(sums)
        verdict = torch.zeros(1 + step.count, dtype=torch.float64, device=residual.device)
        if comm.rank == 0:
            changes = [change(*pair) for pair in sums.tolist()]
            hit = step.may_hit and decide(changes, step.threshold)
            verdict = verdict.new_tensor([float(hit), *changes])
        comm.broadcast(verdict)
        hit, *found = verdict.tolist()
        self.changes = tuple(found)
        return bool(hit)

    @staticmethod
    def _hand_on(spec: Blocks, block: Arguments):
        """A skipped block's output: its own tokens."""
        held = {segments: block.get(name) for name, segments in spec.tokens.items()}
        outputs = [held[segments] for segments in spec.returns]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)
