"""The First Block Cache on a stack: compares the first block's residual, and skips the blocks after it on a hit.

Blocks are skipped by replacing ``forward`` on the instances (``remove()`` deletes the replacement), inside the cutting
hooks, so that the stock loop, its hooks and its joins run as ever. On a hit each block hands its tokens on, and the
last one returns first block's output + residual of the rest: whatever the loop added in between (ControlNet
residuals, side lists) is part of that residual already and is overwritten, not counted twice. A plan with several
streams keeps one residual each and compares them together.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol, SupportsFloat

import torch

from ..plans.plan import Blocks, parameters
from ..sequence.cut import Cut
from ..sequence.hooks import Arguments, Hooks, tokens
from ..sequence.mesh import Comm
from ..sequence.replace import replace
from ..sequence.solo import SOLO
from .predictor import History
from .rule import Window, change, decide


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
    """What rank 0 says about the cache before a forward. ``chunks``: this rank's; ``count``: conditions of the whole step.

    ``sigma`` is asked for in the middle of the forward, when the device has been waited for anyway. ``window``: where hits are
    allowed besides, for rank 0, which decides.
    """

    sigma: SupportsFloat
    threshold: float
    chunks: tuple[Chunk, ...]
    count: int
    compare: bool
    may_hit: bool
    order: int
    window: Window = Window()


@dataclass
class Entry:
    """Of one condition, per stream of the plan: the first block's residual, and those of the blocks after it."""

    first: list[torch.Tensor]
    rest: list[History]


class Tap(Protocol):
    """Someone who records a forward in three parts (a graph capture) and will call ``observe`` and ``finish`` later."""

    def after_first(self, before: list[torch.Tensor], after: list[torch.Tensor]) -> None: ...
    def after_last(self, streams: list[torch.Tensor]) -> None: ...


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
        self._first: list[torch.Tensor] | None = None
        self._batch = hooks.stacks[0][0].batch
        self._undo: list[Callable[[], None]] = []
        flat = [(spec, block) for spec, blocks in hooks.stacks for block in blocks]
        for index, (spec, block) in enumerate(flat):
            wrap = self._first_block if index == 0 else self._later_block
            forward = wrap(spec, block.forward, parameters(spec, block), index == len(flat) - 1)
            self._undo.append(replace(block, "forward", forward))
        for spec, block in [(spec, block) for spec, blocks in hooks.sides for block in blocks]:
            self._undo.append(replace(block, "forward", self._later_block(spec, block.forward, parameters(spec, block), False)))

    def begin(self, step: Step | None, comm: Comm | None = None) -> None:
        self.step, self.comm = step, comm
        self.hit, self.changes = False, ()
        self._first = None

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()
        self.forget()

    def forget(self) -> None:
        """Cold start: drop every stored residual."""
        self._entries.clear()
        self._first = None

    def _streams(self, spec: Blocks, output, cut: Cut) -> list[torch.Tensor]:
        """This rank's rows of the plan's streams in a block's output."""
        outputs = [output] if isinstance(output, torch.Tensor) else output
        held = list(zip(spec.returns, outputs, strict=True))
        return [
            next(cut.part(tensor, segments, stream, spec.dim) for segments, tensor in held if stream in segments)
            for stream in self.hooks.plan.streams
        ]

    def _first_block(self, spec: Blocks, original: Callable, names: list[str], _last: bool) -> Callable:
        def forward(*args, **kwargs):
            step, running = self.step, self.hooks.forward
            if step is None or running is None:
                return original(*args, **kwargs)
            given = {segments: tensor for _, _, segments, tensor in tokens(spec, Arguments(names, args, kwargs))}
            before = [given[(stream,)].clone() for stream in self.hooks.plan.streams]  # the block may write into them
            output = original(*args, **kwargs)
            after = self._streams(spec, output, running.cut)
            if self.tap is not None:
                self.tap.after_first(before, after)
            else:
                self.observe(step, before, after)
                running.skipping = self.hit
            return output

        return forward

    def observe(self, step: Step, before: list[torch.Tensor], after: list[torch.Tensor]) -> None:
        """Compare what the first block added, and decide. Per stream, this rank's rows before and after the block."""
        residuals = [new - old for new, old in zip(after, before, strict=True)]
        self._first = [tensor.clone() for tensor in after]
        self.hit = self._decide(step, residuals)
        if not self.hit:
            for chunk in step.chunks:
                self._entry(chunk.key, step.order).first = [self._rows(residual, chunk) for residual in residuals]

    def finish(self, step: Step, streams: list[torch.Tensor]) -> None:
        """At the last block's output: predict the streams in place on a hit, remember what the rest added otherwise."""
        before, self._first = self._first, None
        if before is None:
            return
        for index, (stream, first) in enumerate(zip(streams, before, strict=True)):
            rest = None if self.hit else stream - first
            for chunk in step.chunks:
                history = self._entry(chunk.key, step.order).rest[index]
                if rest is None:
                    torch.add(self._rows(first, chunk), history.predict(float(step.sigma)), out=self._rows(stream, chunk))
                else:
                    history.add(float(step.sigma), self._rows(rest, chunk))

    def _rows(self, tensor: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """A view of one condition's rows."""
        return tensor if self._batch is None else tensor.narrow(self._batch, chunk.start, chunk.stop - chunk.start)

    def _later_block(self, spec: Blocks, original: Callable, names: list[str], last: bool) -> Callable:
        hand_on = handing_on(spec, names)

        def forward(*args, **kwargs):
            step, running = self.step, self.hooks.forward
            if step is None or running is None:
                return original(*args, **kwargs)
            output = hand_on(args, kwargs) if self.hit else original(*args, **kwargs)
            if last and self.tap is not None:
                self.tap.after_last(self._streams(spec, output, running.cut))
            elif last and self._first is not None:  # None where a patch skips the first block
                self.finish(step, self._streams(spec, output, running.cut))
            return output

        return forward

    def _entry(self, key: Hashable, order: int) -> Entry:
        if key not in self._entries:
            self._entries[key] = Entry([], [History(order) for _ in self.hooks.plan.streams])
        return self._entries[key]

    def _complete(self, chunk: Chunk, residuals: list[torch.Tensor]) -> bool:
        """False where nothing is known of the rest, because a patch left out the last block, or changed the number of tokens."""
        entry = self._entries.get(chunk.key)
        if entry is None or not entry.rest[0].points:
            return False
        return all(old.shape == self._rows(new, chunk).shape for old, new in zip(entry.first, residuals, strict=True))

    def _decide(self, step: Step, residuals: list[torch.Tensor]) -> bool:
        """Reduce the sums over all ranks once; rank 0 reads them, decides, and all follow."""
        if not step.compare:
            return self._cold(step)
        comm = self.comm or SOLO
        sums = self._sums(step, residuals)
        comm.all_reduce(sums)
        comm.settle()
        known, hit, changes = False, False, [0.0] * step.count
        if comm.rank == 0:
            rows = sums.tolist()
            known = not any(unknown for *_, unknown in rows)
            changes = [change(*pair) for *pair, _ in rows]
            hit = known and step.may_hit and step.window.holds(float(step.sigma)) and decide(changes, step.threshold)
        if comm.size > 1:
            verdict = sums.new_tensor([float(known), float(hit), *changes])
            comm.broadcast(verdict)
            known, hit, *changes = verdict.tolist()
        if not known:
            return self._cold(step)
        self.changes = tuple(changes)
        return bool(hit)

    def _sums(self, step: Step, residuals: list[torch.Tensor]) -> torch.Tensor:
        """Of this rank's rows, by condition, (count, 3): difference, size, and how many ranks know too little.

        float32, because some devices have no float64.
        """
        sums = torch.zeros(step.count, 3, device=residuals[0].device)
        for chunk in step.chunks:
            row = sums[chunk.index]
            if not self._complete(chunk, residuals):
                row[2] = 1
                continue
            for previous, residual in zip(self._entries[chunk.key].first, residuals, strict=True):
                parts = (previous - self._rows(residual, chunk), previous)
                row[:2].add_(torch.stack([part.abs().sum(dtype=torch.float32) for part in parts]))
        return sums

    def _cold(self, step: Step) -> bool:
        """No hit, and nothing that is known of the step's conditions can be compared with."""
        for chunk in step.chunks:
            self._entries.pop(chunk.key, None)
        return False


def handing_on(spec: Blocks, names: list[str]) -> Callable[[tuple, dict], torch.Tensor | tuple[torch.Tensor, ...]]:
    """A skipped block's output from its arguments: its own tokens. Called many times a step, so it looks up nothing twice."""
    held = {segments: (name, index) for name, index, segments in reversed(spec.held)}  # the first argument that holds them
    places = [held[segments] for segments in spec.returns]

    def hand_on(args: tuple, kwargs: dict):
        block = Arguments(names, args, kwargs)
        outputs = [block.get(name) if index is None else block.get(name)[index] for name, index in places]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return hand_on
