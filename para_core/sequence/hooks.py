"""Forward hooks that cut tokens before the first block of a stack and gather them after the last.

Stock code runs whole up to the first block, so that it computes modulation ranges, masks and offsets from whole
lengths; between the blocks it sees local rows and never notices; after the last block the ``stream`` segment is whole
again on the first rank, and the other ranks stop there (``StackDone``): their result is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..plans.plan import Blocks, Plan, attribute, check, parameters
from .cut import Cut, TokenError, gather
from .layout import Joint
from .mesh import Mesh


class StackDone(Exception):
    """Ends the forward of a rank whose rows have been handed over."""


class Forward:
    """One forward on one rank: its cut, and what the attention override needs to know while a block runs.

    joint: the joint sequence of the exchanged attention while such a call may happen, else None. block: that of the
    running block, whether or not such a call is happening.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.cut = Cut(mesh.sequence.rank, mesh.sequence.size)
        self.sharded = False
        self.joint: Joint | None = None
        self.block: Joint | None = None


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


class Hooks:
    """Hooks of one plan on one model; idle unless ``forward`` is set. ``remove()`` leaves the model as it was.

    Raises PlanError when the model does not look as the plan expects.
    """

    def __init__(self, plan: Plan, model: torch.nn.Module):
        self.plan = plan
        self.forward: Forward | None = None
        self.stacks = check(plan, model)
        self.last = self.stacks[-1][1][-1]
        self._handles: list = []
        self._submodules: list = []
        for spec, blocks in self.stacks:
            names = parameters(blocks[0])
            for block in blocks:
                self._handles.append(block.register_forward_pre_hook(self._before(spec, names), with_kwargs=True))
                self._handles.append(block.register_forward_hook(self._after(spec, block is self.last)))
                for name in spec.exchange or ():
                    module = attribute(block, name)
                    self._submodules.append(module.register_forward_pre_hook(self._enter(spec)))
                    self._submodules.append(module.register_forward_hook(self._leave))

    def remove(self) -> None:
        self.release_submodules()
        for handle in self._handles:
            handle.remove()

    def release_submodules(self) -> None:
        """Take the hooks off submodules: compiled blocks say themselves which of their calls are exchanged."""
        for handle in self._submodules:
            handle.remove()
        self._submodules.clear()

    def _before(self, spec: Blocks, names: list[str]) -> Callable:
        def before(_module, args, kwargs):
            forward = self.forward
            if forward is None:
                return None
            cut = forward.cut
            if forward.sharded:
                forward.block = cut.joint(spec.joint)
            if forward.sharded and cut.ranks == 1:  # nothing is cut
                if spec.exchange is None:
                    forward.joint = cut.joint(spec.joint)
                return None
            block = Arguments(names, args, kwargs)
            if not forward.sharded:
                measure(cut, spec, block)
                for name, segments in spec.tokens.items():
                    block.put(name, own(cut.local(block.get(name), segments, 1), cut))
                forward.sharded = True
                forward.block = cut.joint(spec.joint)
            else:
                expect(cut, spec, block)
            for name, (segments, dim) in spec.tables.items():
                value = block.get(name)
                if value is not None:
                    block.put(name, cut.table(value, segments, dim))
            for name, rule in spec.rules.items():
                value = block.get(name)
                if value is not None:
                    block.put(name, rule(cut, value))
            if spec.exchange is None:
                forward.joint = cut.joint(spec.joint)
            return tuple(block.args), block.kwargs

        return before

    def _after(self, spec: Blocks, last: bool) -> Callable:
        def after(_module, _args, output):
            forward = self.forward
            if forward is None:
                return None
            forward.joint = None
            return self._gather(forward, spec, output) if last else None

        return after

    def _gather(self, forward: Forward, spec: Blocks, output):
        """The last block's output with the stream whole on the first rank; ends the forward on the others."""
        forward.sharded = False
        cut, comm = forward.cut, forward.mesh.sequence
        if comm.size == 1:
            return None
        outputs = [output] if isinstance(output, torch.Tensor) else list(output)
        for index, segments in enumerate(spec.returns):
            if self.plan.stream not in segments:
                continue
            whole = gather(cut.part(outputs[index], segments, self.plan.stream), cut.rows[self.plan.stream], comm)
            if whole is None:
                raise StackDone
            pieces = [whole if name == self.plan.stream else cut.part(outputs[index], segments, name) for name in segments]
            outputs[index] = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        return outputs[0] if isinstance(output, torch.Tensor) else type(output)(outputs)

    def _enter(self, spec: Blocks) -> Callable:
        def enter(_module, _args):
            if self.forward is not None:
                self.forward.joint = self.forward.cut.joint(spec.joint)

        return enter

    def _leave(self, _module, _args, _output) -> None:
        if self.forward is not None:
            self.forward.joint = None


def measure(cut: Cut, spec: Blocks, block: Arguments) -> None:
    """Read the whole length of every segment off the first block's token arguments."""
    for name, segments in spec.tokens.items():
        if len(segments) != 1:
            raise TokenError(f"the first block's {name} must hold one segment, not {segments}")
        cut.measure(segments[0], block.get(name).shape[1])


def own(rows: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Stock blocks write into their inputs: a shard must not be a view of what other code still reads."""
    return rows if cut.ranks == 1 else rows.clone(memory_format=torch.contiguous_format)


def expect(cut: Cut, spec: Blocks, block: Arguments) -> None:
    """Between blocks nothing may have changed the number of rows: a patch that did would be silently wrong."""
    for name, segments in spec.tokens.items():
        rows = sum(cut.rows[segment][cut.rank] for segment in segments)
        if block.get(name).shape[1] != rows:
            raise TokenError(f"{name} has {block.get(name).shape[1]} rows between blocks, expected {rows}")


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
        if not isinstance(item, torch.Tensor) or forward is None or not forward.sharded:
            return item
        cut, stream = forward.cut, self._hooks.plan.stream
        start = min(cut.start(stream), item.shape[1])
        stop = min(start + cut.rows[stream][cut.rank], item.shape[1])
        return item[:, start:stop]
