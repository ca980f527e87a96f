"""One forward of one model through the pack's hooks: the same code on rank 0 and on every sidecar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..attention import wire
from ..attention.beside import Beside
from ..attention.call import Call
from ..attention.choice import Chooser
from ..attention.exchange import PLAIN, Exchange, attend_call
from ..attention.foreign import attend_on_first
from ..attention.message import BYTES, Bytes
from ..attention.traffic import Traffic
from ..cache.first_block import FirstBlockCache, Step
from ..plans.plan import Plan
from ..sequence.cut import TokenError
from ..sequence.hooks import Arguments, Forward, Hooks, LocalControl, StackDone
from ..sequence.layout import Joint
from ..sequence.mesh import Comm, Mesh
from .compiled import CompiledBlocks
from .graphs import Graphs
from .ways import Ways

OVERRIDE = "optimized_attention_override"


class AttentionOverride:
    """``optimized_attention_override`` of one sampling run: the chosen local kernel, exchanged where tokens are cut.

    ``stock``: the function that computes attention where no other is chosen; only compiled blocks need to be told.
    ``foreign``: rank 0 keeps another node's override, and computes the attention of shared forwards with it.
    ``compiled``: blocks are compiled, and what quantises tensors on their way is too.
    """

    def __init__(
        self, chooser: Chooser, hooks: Hooks | None, stock: Callable | None = None, *, foreign: bool = False, compiled: bool = False
    ):
        self.chooser, self.hooks, self.stock, self.foreign = chooser, hooks, stock, foreign
        self.ways = Ways(chooser, compiled=compiled)
        self._bytes = Bytes(*wire.compiled()) if compiled else BYTES
        self.traffic = Traffic()
        self.attended: Callable[[], None] = lambda: None
        """Called after every call that was exchanged."""
        self._exchanges: dict[tuple[int, Joint, Joint], Exchange] = {}

    def __call__(self, func: Callable, *args, **kwargs) -> torch.Tensor:
        forward = self.hooks.forward if self.hooks is not None else None
        if self.foreign and forward is not None and forward.mesh.sequence.size > 1 and not forward.over:
            assert self.hooks is not None
            return attend_on_first(Call.parse(func, args, kwargs), forward, self.hooks.plan.streams[0], self.chooser.previous)
        exchange = None
        pair = forward.pair() if forward is not None and forward.mesh.sequence.size > 1 else None
        if pair is not None:
            assert forward is not None
            exchange = self._exchange(forward.mesh, *pair)
        elif self.chooser.setting is None and self.chooser.previous is None:
            return func(*args, **kwargs)
        call = Call.parse(func, args, kwargs)
        return self._attend(exchange, call)

    def compute(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        *,
        place: int | None,
        low_precision: bool,
        beside: Beside | None = None,
    ) -> torch.Tensor:
        """Attention inside compiled blocks: q ``(B, H, S, D)``, k and v ``(B, Hkv, M, D)`` -> ``(B, H, S, D)``."""
        assert self.stock is not None, "compiled blocks need to know the stock attention function"
        kwargs: dict[str, Any] = {"mask": mask, "skip_reshape": True, "skip_output_reshape": True, "_inside_attn_wrapper": True}
        if scale is not None:
            kwargs["scale"] = scale
        if not low_precision:
            kwargs["low_precision_attention"] = False
        if k.shape[1] != q.shape[1]:
            kwargs["enable_gqa"] = True
        call = Call.parse(self.stock, (q, k, v, q.shape[1]), kwargs)
        forward = self.hooks.forward if self.hooks is not None else None
        exchange = None
        if place is not None and forward is not None and forward.block and forward.mesh.sequence.size > 1:
            exchange = self._exchange(forward.mesh, *forward.block[place % len(forward.block)])
        return self._attend(exchange, call, beside)

    def _attend(self, exchange: Exchange | None, call: Call, beside: Beside | None = None) -> torch.Tensor:
        way = PLAIN if exchange is None else self.ways.way(exchange, call, self._where(), beside)
        out = attend_call(exchange, call, self.chooser.kernel(call), way, beside)
        if exchange is not None:
            self.attended()
        return out

    def _where(self) -> str:
        """The list of blocks that runs."""
        spec = self.hooks.forward.inside if self.hooks is not None and self.hooks.forward is not None else None
        return spec.path if spec is not None else ""

    def _exchange(self, mesh: Mesh, q: Joint, kv: Joint) -> Exchange:
        key = (id(mesh), q, kv)
        if key not in self._exchanges or self._exchanges[key].mesh is not mesh:
            self._exchanges[key] = Exchange(mesh, q, kv, bytes=self._bytes, traffic=self.traffic)
        return self._exchanges[key]


class KernelBroken(RuntimeError):
    """The forward must be computed again; the chooser has put another kernel in place."""


class Runner:
    """Hooks, attention override, cache and execution of one model for one sampling run.

    ``run`` is for one forward at a time. shared: False where each runs on this rank alone.
    Raises PlanError when the model does not look as its plan expects.
    """

    def __init__(
        self,
        plan: Plan,
        model: torch.nn.Module,
        chooser: Chooser,
        *,
        cached: bool,
        compiled: bool = False,
        stock: Callable | None = None,
        foreign: bool = False,
        shared: bool = True,
    ):
        self.hooks = Hooks(plan, model, crossing=foreign, shared=shared)
        self.override = AttentionOverride(chooser, self.hooks, stock, foreign=foreign, compiled=compiled)
        self.compiled = CompiledBlocks(self.hooks, self.override, OVERRIDE, chooser.say, shared=shared) if compiled else None
        self.cache = FirstBlockCache(self.hooks) if cached else None
        self.graphs = Graphs(chooser.say)
        self.override.attended = self.graphs.attended
        if self.compiled is not None:
            self.compiled.around = self.graphs.constants.paused

    def remove(self) -> None:
        """Leave the model as it was."""
        self.graphs.drop()
        if self.cache is not None:
            self.cache.remove()
        if self.compiled is not None:
            self.compiled.remove()
        self.hooks.remove()

    def measure(self, device: torch.device) -> list[str]:
        """Time the attention kernels for kinds of call that were new in the last forward. Returns those kinds."""
        kinds = self.override.chooser.measure(device)
        if kinds:
            self.graphs.drop()
        return kinds

    def learn(self, table: dict[str, dict[str, float]]) -> None:
        """Choose attention kernels by what another rank has measured."""
        self.override.chooser.learn(table)
        self.graphs.drop()

    def run(
        self,
        call: Callable,
        names: list[str],
        args: tuple,
        kwargs: dict[str, Any],
        *,
        mesh: Mesh,
        step: Step | None = None,
        comm: Comm | None = None,
        graph: bool = False,
        whole: bool = False,
    ):
        """The result of ``call(*args, **kwargs)`` on ``mesh``'s first rank, None on the others.

        names: positional parameters of ``call``. step: what the cache shall do; comm: every rank that shares the step.
        graph: replay a CUDA graph where there is one for this shape, and capture one where there is none.
        whole: make all tokens whole between blocks, for what mixes them there.
        Raises PlanError, on every rank, for a forward that cannot be cut, KernelBroken where the result cannot be used.
        """
        arguments = Arguments(names, args, dict(kwargs))
        plan = self.hooks.plan
        control = arguments.get("control") if plan.control else None
        if isinstance(control, dict):
            arguments.put("control", LocalControl(control, self.hooks))

        def forward(*args, **kwargs):
            self.override.chooser.begin_forward()
            state = self.hooks.forward = Forward(mesh, plan.segments if whole else plan.whole)
            try:
                result = call(*args, **kwargs)
                if state.sharded and mesh.sequence.size > 1 and not state.whole >= plan.segments:
                    raise TokenError(f"the last block of {plan.family} did not run: its tokens were not gathered")
                return None if mesh.sequence.rank else result
            except StackDone:
                return None
            finally:
                self.hooks.forward = None

        if self.cache is not None:
            self.cache.begin(step, comm)
        self.override.chooser.will_capture = graph
        if graph and not isinstance(control, dict):
            options = arguments.get("transformer_options") or {}
            kept = (*self.hooks.plan.options, OVERRIDE)
            arguments.put("transformer_options", {name: value for name, value in options.items() if name in kept})
            identity = (id(mesh), whole, self.override.ways.identity())
            result = self.graphs.run(forward, tuple(arguments.args), arguments.kwargs, *identity, cache=self.cache if step else None)
        else:
            result = forward(*arguments.args, **arguments.kwargs)
        if comm is not None and comm.rank == 0:
            comm.settle()
        if not self.override.chooser.end_forward():
            self.graphs.drop()  # they hold the kernel that has just been replaced
            raise KernelBroken("an attention kernel gave NaN or infinity")
        return result
