"""One forward of one model through the pack's hooks: the same code on rank 0 and on every sidecar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..attention.choice import Chooser
from ..cache.first_block import FirstBlockCache, Step
from ..plans.plan import Plan
from ..sequence.cut import TokenError
from ..sequence.hooks import Arguments, Forward, Hooks, LocalControl, StackDone
from ..sequence.mesh import Comm, Mesh
from .compiled import CompiledBlocks
from .graphs import Graphs
from .override import OVERRIDE, AttentionOverride


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

    @property
    def settled(self) -> bool:
        """Whether the last forward has left nothing to look at or to measure."""
        return not self.override.chooser.check.watching and not self.override.chooser.timings.pending

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
        ahead: bool = False,
    ):
        """The result of ``call(*args, **kwargs)`` on ``mesh``'s first rank, None on the others.

        names: positional parameters of ``call``. step: what the cache shall do; comm: every rank that shares the step.
        graph: replay a CUDA graph where there is one for this shape, and capture one where there is none.
        whole: make all tokens whole between blocks, for what mixes them there.
        ahead: do not wait for the device, unless ``settled`` says that something must be read from it.
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
        if comm is not None and comm.rank == 0 and not (ahead and self.settled):
            comm.settle()
        if not self.override.chooser.end_forward():
            self.graphs.drop()  # they hold the kernel that has just been replaced
            raise KernelBroken("an attention kernel gave NaN or infinity")
        return result
