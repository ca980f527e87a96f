"""Forward hooks that cut tokens before the first block of a stack and gather them after the last.

Stock code runs whole up to the first block, so that it computes modulation ranges, masks and offsets from whole
lengths; between the blocks it sees local rows and never notices (but for the segments that its plan makes whole after
every block); after the last block the plan's ``streams`` are whole again on the first rank, and the other ranks stop
there (``StackDone``): their result is not used. Where all tokens are made whole after every block, the last is no
different, so that any block may be left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..plans.plan import Blocks, Plan, PlanError, Segments, attribute, check, parameters
from .cut import Cut, TokenError, gather, gather_all
from .layout import Joint
from .mesh import Mesh

Pairs = tuple[tuple[Joint, Joint], ...]


class StackDone(Exception):
    """Ends the forward of a rank whose rows have been handed over."""


class Forward:
    """One forward on one rank: its cut, and what the attention override needs to know while a block runs.

    sharded: tokens are cut and have not been gathered for good. whole: segments that are whole all the same, between two
    blocks. attending: layouts of queries and keys of the exchanged attention calls, in turn, while such calls may happen,
    else None. block: those of the running block (``Blocks.calls``), whether or not such a call is happening. inside: the block list of the
    running block, None between blocks. crossing: segments of the queries while a submodule runs that attends to what every
    rank has whole. sources: what the running block's tokens were cut from, where all are made whole after it.
    skipping: blocks hand on what they are given. over: only the first rank goes on.
    """

    def __init__(self, mesh: Mesh, regather: frozenset[str] = frozenset()):
        self.mesh, self.regather = mesh, regather
        self.cut = Cut(mesh.sequence.rank, mesh.sequence.size, mesh.speeds, regathered=regather)
        self.sharded = False
        self.skipping = self.over = False
        self.inside: Blocks | None = None
        self.crossing: Segments = ()
        self.whole: frozenset[str] = frozenset()
        self.sources: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.attending: Pairs | None = None
        self.block: Pairs = ()
        self._joints: tuple[tuple[Segments, Segments], ...] = ()
        self._call = 0

    def enter(self, pairs: Pairs, joints: tuple[tuple[Segments, Segments], ...]) -> None:
        """Attention calls of these layouts follow; ``joints``: the segments in each."""
        self.attending, self._joints, self._call = pairs, joints, 0

    def pair(self) -> tuple[Joint, Joint] | None:
        """Layouts of the attention call that is being made, None where it stays on this rank."""
        if not self.attending:
            return None
        self._call += 1
        return self.attending[(self._call - 1) % len(self.attending)]

    def joint(self) -> tuple[Segments, Segments]:
        """Segments of the queries and of the keys of the call that ``pair`` has just given."""
        return self._joints[(self._call - 1) % len(self._joints)]


class Arguments:
    """Reads and replaces a call's arguments by name, however they were passed. ``kwargs`` is changed in place."""

    __slots__ = ("args", "kwargs", "names")

    def __init__(self, names: list[str], args: Sequence[Any], kwargs: dict[str, Any]):
        self.names, self.args, self.kwargs = names, list(args), kwargs

    def get(self, name: str) -> Any:
        """None where the argument was not passed."""
        if name in self.kwargs:
            return self.kwargs[name]
        index = self.names.index(name) if name in self.names else len(self.args)
        return self.args[index] if index < len(self.args) else None

    def put(self, name: str, value: Any) -> None:
        if name not in self.kwargs and name in self.names[: len(self.args)]:
            self.args[self.names.index(name)] = value
        else:
            self.kwargs[name] = value


def tokens(spec: Blocks, block: Arguments) -> Iterator[tuple[str, int | None, tuple[str, ...], torch.Tensor]]:
    """Every token tensor of a call: argument, place in an argument of several, segments, tensor."""
    for name, index, segments in spec.held:
        value = block.get(name)
        tensor = value if index is None or value is None else value[index]
        if not isinstance(tensor, torch.Tensor):
            raise TokenError(f"the block's {name} holds no tokens")
        yield name, index, segments, tensor


class Hooks:
    """Hooks of one plan on one model; idle unless ``forward`` is set. ``remove()`` leaves the model as it was.

    stacks: the block lists that the tokens go through, in order; sides: lists that run between their blocks.
    crossing: say of attention to what every rank has whole where it happens (``Forward.crossing``).
    shared: False where every forward runs on one rank, which needs hooks on the first and the last block only.
    Raises PlanError when the model does not look as the plan expects.
    """

    def __init__(self, plan: Plan, model: torch.nn.Module, *, crossing: bool = False, shared: bool = True):
        self.plan = plan
        self.forward: Forward | None = None
        found = check(plan, model)
        self.stacks = [(spec, blocks) for spec, blocks in found if not spec.side]
        self.sides = [(spec, blocks) for spec, blocks in found if spec.side]
        chain = [block for _, blocks in self.stacks for block in blocks] or [None]
        self.first, self.last = chain[0], chain[-1]
        self._handles: list = []
        self._submodules: list = []
        for spec, blocks in found:
            for block in blocks:
                if not shared and block is not self.first and block is not self.last:
                    continue
                names = parameters(spec, block)
                self._handles.append(block.register_forward_pre_hook(self._before(spec, names, block), with_kwargs=True))
                self._handles.append(block.register_forward_hook(self._after(spec, block)))
                for name in spec.exchange or ():
                    module = attribute(block, name)
                    self._submodules.append(module.register_forward_pre_hook(self._enter(spec, name)))
                    self._submodules.append(module.register_forward_hook(self._leave))
                for name in spec.crosses if crossing else ():
                    module = attribute(block, name)
                    self._handles.append(module.register_forward_pre_hook(self._cross(spec.joints[0][0])))
                    self._handles.append(module.register_forward_hook(self._cross(())))
        if plan.final:
            self._handles.append(attribute(model, plan.final).register_forward_pre_hook(self._before_final))

    def remove(self) -> None:
        self.release_submodules()
        for handle in self._handles:
            handle.remove()

    def release_submodules(self) -> None:
        """Take the hooks off submodules: compiled blocks say themselves which of their calls are exchanged."""
        for handle in self._submodules:
            handle.remove()
        self._submodules.clear()

    def _before(self, spec: Blocks, names: list[str], module: torch.nn.Module) -> Callable:
        last, first = module is self.last, module is self.first
        joints, calls, everything = spec.joints, spec.calls, spec.exchange is None
        tables, rules = list(spec.tables.items()), list(spec.rules.items())

        def before(_module, args, kwargs):
            forward = self.forward
            if forward is None:
                return None
            cut = forward.cut
            if forward.sharded and (cut.ranks == 1 or (forward.skipping and not last and (forward.whole or not spec.side))):
                return None
            if cut.ranks == 1 and not first:
                return None  # a patch skips the first block: there is nothing to cut, and nothing to compare
            block = Arguments(names, args, kwargs)
            if not forward.sharded:
                self._measure(forward, spec, block)
                if cut.ranks == 1:
                    return None
            if forward.whole or spec.side:
                self._cut(forward, spec, block)
                place_stream(cut, spec, block, self.plan.streams[0])
            else:
                for name, _, segments, tensor in tokens(spec, block):
                    expect(cut, name, segments, tensor, spec.dim)
            for name, (segments, dim) in tables:
                value = block.get(name)
                if value is not None:
                    block.put(name, cut.table(value, segments, dim))
            for name, rule in rules:
                value = block.get(name)
                if value is not None:
                    block.put(name, rule(cut, value))
            forward.block, forward.inside = cut.pairs(calls), spec
            if everything:
                forward.enter(forward.block, joints)
            return tuple(block.args), block.kwargs

        return before

    def _measure(self, forward: Forward, spec: Blocks, block: Arguments) -> None:
        """Read the whole length of every segment off the first block's token arguments."""
        cut = forward.cut
        for name, _, segments, tensor in tokens(spec, block):
            if len(segments) != 1 and not forward.regather >= self.plan.segments:
                raise TokenError(f"the first block's {name} must hold one segment, not {segments}")
            *others, segment = segments
            for other in others:  # blocks before it were left out: what they would have held apart is cut as one
                cut.measure(other, 0)
            length = tensor.shape[spec.dim]
            unit = spec.units[segment](block.get, length) if segment in spec.units else 1
            sides = [1 if dim in (spec.batch, spec.dim) else side for dim, side in enumerate(tensor.shape[:-1])]
            cut.measure(segment, length, unit, (math.prod(sides[: spec.dim]), math.prod(sides[spec.dim :])))
        for segment, length in cut.lengths.items():  # stock code infers sizes from others, which an empty shard does not allow
            if length and not min(cut.rows[segment]):
                raise PlanError(f"{self.plan.family} has too few rows of {segment} here ({length}) for {cut.ranks} ranks")
        forward.sharded, forward.whole = True, frozenset(spec.segments)

    def _cut(self, forward: Forward, spec: Blocks, block: Arguments) -> None:
        """Keep this rank's rows of what is whole. Stock blocks write into their inputs: a shard is no view of them."""
        cut = forward.cut
        forward.sources.clear()
        for name, index, segments, tensor in tokens(spec, block):
            whole = forward.whole
            if spec.side:
                whole = frozenset(segments if tensor.shape[spec.dim] == cut.width(segments, segments) else ())
            if not whole.intersection(segments):
                expect(cut, name, segments, tensor, spec.dim)
                continue
            local = cut.local(tensor, segments, spec.dim, whole).clone(memory_format=torch.contiguous_format)
            if forward.regather >= self.plan.segments:
                forward.sources[id(local)] = (local, tensor)
            if index is None:
                block.put(name, local)
            else:
                value = block.get(name)
                block.put(name, type(value)(local if place == index else item for place, item in enumerate(value)))

    def _after(self, spec: Blocks, module: torch.nn.Module) -> Callable:
        last, first = module is self.last, module is self.first

        def after(_module, _args, output):
            forward = self.forward
            if forward is None:
                return None
            forward.attending = forward.inside = None
            mixed = forward.regather >= self.plan.segments  # what comes after a block may look at all tokens
            if last and not (mixed and forward.cut.ranks > 1):
                return self._finish(forward, spec, output)
            if forward.cut.ranks == 1 or (forward.skipping and not first and not last):
                return None
            if not spec.side:
                forward.whole = forward.regather
            return self._join(forward, spec, output, forward.regather, gather_all) if forward.regather else None

        return after

    def _finish(self, forward: Forward, spec: Blocks, output):
        """The last block's output with the streams whole on the first rank; ends the forward on the others."""
        if forward.cut.ranks == 1:
            forward.sharded = False
            return None
        if self.plan.final:
            return None
        forward.sharded, forward.over = False, True
        output = self._join(forward, spec, output, frozenset(self.plan.streams), gather)
        if forward.cut.rank:
            raise StackDone
        return output

    def _join(self, forward: Forward, spec: Blocks, output, wanted: frozenset[str], gathering: Callable):
        """A block's output with the segments in ``wanted`` whole, where ``gathering`` makes them so."""
        cut, comm = forward.cut, forward.mesh.sequence
        outputs = [output] if isinstance(output, torch.Tensor) else list(output)
        for index, segments in enumerate(spec.returns):
            if outputs[index] is None or not wanted.intersection(segments):
                continue
            pieces = [cut.part(outputs[index], segments, name, spec.dim) for name in segments]
            pieces = [
                gathering(piece, cut.rows[name], comm, spec.dim) if name in wanted else piece
                for name, piece in zip(segments, pieces, strict=True)
            ]
            if any(piece is None for piece in pieces):
                continue
            joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=spec.dim)
            local, source = forward.sources.get(id(outputs[index]), (None, None))
            if source is not None and local is outputs[index]:
                joined = source.copy_(joined)  # the block has written into its input, which code between blocks may have kept
            outputs[index] = joined
        return outputs[0] if isinstance(output, torch.Tensor) else type(output)(outputs)

    def _before_final(self, _module, args):
        forward = self.forward
        if forward is None or not forward.sharded or forward.whole.issuperset(self.plan.streams):
            return None
        forward.sharded, forward.over = False, True
        (stream,) = self.plan.streams
        whole = gather(args[0], forward.cut.rows[stream], forward.mesh.sequence)
        if whole is None:
            raise StackDone
        return (whole, *args[1:])

    def _enter(self, spec: Blocks, name: str) -> Callable:
        joints = (spec.exchange[name],) if isinstance(spec.exchange, dict) else spec.joints

        def enter(_module, _args):
            if self.forward is not None and self.forward.sharded and self.forward.cut.ranks > 1:
                self.forward.enter(self.forward.cut.pairs(joints), joints)

        return enter

    def _cross(self, segments: Segments) -> Callable:
        def cross(*_):
            if self.forward is not None:
                self.forward.crossing = segments

        return cross

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While code runs that only this rank has: whatever it calls is not shared."""
        forward, self.forward = self.forward, None
        try:
            yield
        finally:
            self.forward = forward

    def _leave(self, _module, _args, _output) -> None:
        if self.forward is not None:
            self.forward.attending = None


def expect(cut: Cut, name: str, segments: tuple[str, ...], tensor: torch.Tensor, dim: int) -> None:
    """Between blocks nothing may have changed the number of rows: a patch that did would be silently wrong."""
    if tensor.shape[dim] != cut.width(segments):
        raise TokenError(f"{name} has {tensor.shape[dim]} rows between blocks, expected {cut.width(segments)}")


def place_stream(cut: Cut, spec: Blocks, block: Arguments, stream: str) -> None:
    """Where the stream begins and the tokens end, which the loop has told attention patches of whole tokens, for local ones."""
    options = block.get("transformer_options")
    joined = next((segments for _, _, segments in spec.held if stream in segments[1:]), None)
    if joined is not None and isinstance(options, dict) and "img_slice" in options:
        if not any(cut.lengths[name] for name in joined[: joined.index(stream)]):
            cut.image_slice = options["img_slice"]  # the blocks before were left out: what is cut as one is two for the patches
        local = [cut.width(joined[: joined.index(stream)]), cut.width(joined)]
        block.put("transformer_options", {**options, "img_slice": local})


class LocalControl(dict):
    """``control`` for the block loop: its lists hand out the local rows of each whole-length residual.

    Residuals may cover only the first tokens of the stream (reference tokens follow them).
    """

    def __init__(self, control: dict, hooks: Hooks):
        super().__init__({key: LocalRows(value, hooks) if isinstance(value, list) else value for key, value in control.items()})


class LocalRows(list):
    def __init__(self, items: list, hooks: Hooks):
        super().__init__(items)
        self._hooks = hooks

    def __getitem__(self, index):
        item, forward = super().__getitem__(index), self._hooks.forward
        stream = self._hooks.plan.streams[0]
        if not isinstance(item, torch.Tensor) or forward is None or not forward.sharded or stream in forward.whole:
            return item
        cut = forward.cut
        start = min(cut.start(stream), item.shape[1])
        stop = min(start + cut.rows[stream][cut.rank], item.shape[1])
        return item[:, start:stop]
