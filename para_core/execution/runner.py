"""One forward of one model through the pack's hooks: the same code on rank 0 and on every sidecar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..attention.call import Call
from ..attention.choice import Chooser
from ..attention.exchange import Exchange, attend_call
from ..attention.traffic import Traffic
from ..cache.first_block import FirstBlockCache, Step
from ..plans.plan import Plan
from ..sequence.hooks import Arguments, Forward, Hooks, LocalControl, StackDone
from ..sequence.layout import Joint
from ..sequence.mesh import Comm, Mesh


class AttentionOverride:
    """``optimized_attention_override`` of one sampling run: the chosen local kernel, exchanged where tokens are cut."""

    def __init__(self, chooser: Chooser, hooks: Hooks | None):
        self.chooser, self.hooks = chooser, hooks
        self.traffic = Traffic()
        self._exchanges: dict[tuple[int, Joint], Exchange] = {}

    def __call__(self, func: Callable, *args, **kwargs) -> torch.Tensor:
        forward = self.hooks.forward if self.hooks is not None else None
        exchange = None
        if forward is not None and forward.joint is not None and forward.mesh.sequence.size > 1:
            exchange = self._exchange(forward.mesh, forward.joint)
        elif self.chooser.setting is None and self.chooser.previous is None:
            return func(*args, **kwargs)
        call = Call.parse(func, args, kwargs)
        return attend_call(exchange, call, self.chooser.kernel(call))

    def _exchange(self, mesh: Mesh, joint: Joint) -> Exchange:
        key = (id(mesh), joint)
        if key not in self._exchanges or self._exchanges[key].mesh is not mesh:
            self._exchanges[key] = Exchange(mesh, joint, joint, traffic=self.traffic)
        return self._exchanges[key]


class Runner:
    """Hooks, attention override and cache of one model for one sampling run.

    ``run`` is for one forward at a time. Raises PlanError when the model does not look as its plan expects.
    """

    def __init__(self, plan: Plan, model: torch.nn.Module, chooser: Chooser, *, cached: bool):
        self.hooks = Hooks(plan, model)
        self.override = AttentionOverride(chooser, self.hooks)
        self.cache = FirstBlockCache(self.hooks) if cached else None

    def remove(self) -> None:
        """Leave the model as it was."""
        if self.cache is not None:
            self.cache.remove()
        self.hooks.remove()

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
    ):
        """The result of ``call(*args, **kwargs)`` on ``mesh``'s first rank, None on the others.

        names: positional parameters of ``call``. step: what the cache shall do; comm: every rank that shares the step.
        """
        if self.hooks.plan.control:
            arguments = Arguments(names, args, dict(kwargs))
            control = arguments.get("control")
            if isinstance(control, dict):
                arguments.put("control", LocalControl(control, self.hooks))
                args, kwargs = tuple(arguments.args), arguments.kwargs
        if self.cache is not None:
            self.cache.begin(step, comm)
        self.override.chooser.begin_forward()
        self.hooks.forward = Forward(mesh)
        try:
            return call(*args, **kwargs)
        except StackDone:
            return None
        finally:
            self.hooks.forward = None
