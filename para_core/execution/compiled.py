"""Compiled blocks: ``torch.compile`` block by block, one artefact a block class, with attention behind one operation.

What changes from call to call or block to block (block index, closures of other nodes, counters) must not reach the
compiled code, whose guards would compile it again each time. A block is therefore given transformer options that hold
nothing but the attention operation of this run and what the plan names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..attention.call import Call
from ..log import log
from ..plans.plan import attribute
from ..sequence.hooks import Hooks
from ..sequence.replace import replace
from .inductor import for_ranks, inductor
from .operation import number
from .override import AttentionOverride


class CompiledBlocks:
    """Compiled forwards on the blocks of ``hooks``; ``remove()`` deletes them. ``option``: the options key of an override.

    A block that cannot be compiled runs as it is, and so do all from then on; ``say`` hears why, and ``failure`` keeps it.
    ``shared``: several ranks run them. ``backend``: another compiler than torch's own.
    """

    def __init__(
        self,
        hooks: Hooks,
        attend: AttentionOverride,
        option: str,
        say: Callable[[str], None],
        *,
        shared: bool = False,
        backend: str | Callable | None = None,
    ):
        backend = backend or (for_ranks if shared else inductor)  # a function each: compiled code is found again by its compiler
        self.failure: str | None = None
        self._say = say
        self._undo: list[Callable[[], None]] = []
        self._number = number(attend)
        self._attend = attend  # keeps its number
        self._kept = hooks.plan.options
        self.around: Callable[[], AbstractContextManager] = nullcontext
        """What compiled code runs in."""
        forwards: dict[type, Callable] = {}
        hooks.release_submodules()
        for spec, blocks in (*hooks.stacks, *hooks.sides):
            for block in blocks:
                if type(block) not in forwards:
                    forwards[type(block)] = torch.compile(type(block).forward, fullgraph=True, backend=backend)
                for place, name in enumerate(spec.exchange or ()):
                    exchanged = functools.partial(override, self._number, [place if isinstance(spec.exchange, Mapping) else 0])
                    self._undo.append(mark(attribute(block, name), {option: exchanged}))
                turns = () if spec.exchange else tuple(range(len(spec.calls)))
                self._undo.append(replace(block, "forward", self._wrap(block, forwards[type(block)], option, turns)))

    def _wrap(self, block: torch.nn.Module, compiled: Callable, option: str, turns: tuple[int, ...]) -> Callable:
        def forward(*args, **kwargs):
            given = kwargs.get("transformer_options") or {}
            options = {option: functools.partial(override, self._number, list(turns))}
            if patched(given):
                return type(block).forward(block, *args, **{**kwargs, "transformer_options": {**given, **options}})
            kwargs["transformer_options"] = {**options, **{name: given[name] for name in self._kept if name in given}}
            if self.failure is None:
                # one memory layout for all blocks: the first block's tokens may be a transposed view
                args = tuple(dense(value) for value in args)
                kwargs = {name: dense(value) for name, value in kwargs.items()}
                try:
                    with self.around():
                        return compiled(block, *args, **kwargs)
                except torch._dynamo.exc.TorchDynamoException as error:
                    self.failure = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
                    self._say(f"Blocks run as they are, because {type(block).__name__} could not be compiled: {self.failure}")
                    log.info("what the compiler said: %s", error)
                except limit_hit():
                    self.failure = "torch keeps no more versions of it; when ComfyUI is started again there is room for others"
                    self._say(f"Blocks run as they are, because {type(block).__name__} could not be compiled: {self.failure}.")
            return type(block).forward(block, *args, **kwargs)

        return forward

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()


def limit_hit() -> tuple[type[Exception], ...]:
    """What torch raises where it keeps no more versions of a block: its name has changed, and an old torch may have neither."""
    names = "FailOnRecompileLimitHit", "FailOnCacheLimitHit"
    return tuple(getattr(torch._dynamo.exc, name) for name in names if hasattr(torch._dynamo.exc, name))


def mark(module: torch.nn.Module, exchanged: dict[str, Any]) -> Callable[[], None]:
    """Have a submodule of a block use the exchanging operation. Returns what undoes it."""
    original = type(module).forward

    def forward(*args, **kwargs):
        given = kwargs.get("transformer_options") or {}
        own = {**given, **exchanged} if patched(given) else exchanged
        return original(module, *args, **{**kwargs, "transformer_options": own})

    return replace(module, "forward", forward)


def patched(options: dict[str, Any]) -> bool:
    """Whether code of other nodes runs inside the block: nodes may add it in the middle of a run."""
    return bool(options.get("patches"))


def dense(value: Any) -> Any:
    return value.contiguous() if isinstance(value, torch.Tensor) else value


def override(run: int, turns: list[int], func: Callable, *args, **kwargs) -> torch.Tensor:
    """The attention override inside compiled blocks.

    turns: places of the calls that see the tokens of all ranks, the next one first; without any, calls stay on this rank.
    The compiler may put calls in another order, so each carries its place.
    """
    place = turns[0] if turns else None
    if len(turns) > 1:
        turns.append(turns.pop(0))
    call = Call.parse(func, args, kwargs)
    q, k = rows_first(call.q), rows_first(call.k)
    return call.output(torch.ops.paradit.attention(q, k, call.v, call.mask, call.scale, run, place, call.low_precision))


def rows_first(x: torch.Tensor) -> torch.Tensor:
    """``(B, H, S, D)`` in memory ``(B, S, H, D)``: costs nothing where the compiler computes it, and saves a copy after kernels
    whose output lies as their query does."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
