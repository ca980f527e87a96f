"""Attention masks of every form, put into the calls of a model's attention that see all tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from para_core.attention.call import Call
from para_core.execution.runner import Runner
from para_core.plans.plan import Plan, attribute, check

# name -> bool or additive, and which of batch, head, query and key dim are there ("1": of size 1)
MASKS: dict[str, tuple[bool, str] | None] = {
    "none": None,
    "bool, 2-D": (True, "SM"),
    "additive, 2-D": (False, "SM"),
    "bool, 2-D, keys": (True, "1M"),
    "additive, 3-D": (False, "BSM"),
    "bool, 3-D, one for all": (True, "1SM"),
    "additive, 3-D, keys": (False, "B1M"),
    "additive, 4-D": (False, "BHSM"),
    "bool, 4-D, keys": (True, "B11M"),
    "bool, 4-D, one for all heads": (True, "B1SM"),
    "additive, 4-D, keys of each head": (False, "1H1M"),
    "additive, 4-D, one for all": (False, "11SM"),
}


def made(form: tuple[bool, str], batch: int, heads: int, queries: int, keys: int) -> torch.Tensor:
    """The same for the same sizes. Every row may attend to the first key."""
    boolean, dims = form
    sizes = {"B": batch, "H": heads, "S": queries, "M": keys, "1": 1}
    mask = torch.randn([sizes[dim] for dim in dims], generator=torch.Generator().manual_seed(queries * 100 + keys))
    if boolean:
        mask = mask > 0
        mask[..., 0] = True
        return mask
    mask = mask.masked_fill(mask > 0.8, float("-inf"))
    mask[..., 0] = 0.0
    return mask


class Masked:
    """Stands in front of the attention of a model, stock or shared, and masks the calls that the plan exchanges."""

    def __init__(self, form: tuple[bool, str], batch: int):
        self.form, self.batch = form, batch
        self._inside = threading.local()

    def __deepcopy__(self, _memo: dict) -> Masked:
        return self  # copies of a model share it

    @contextmanager
    def watching(self, plan: Plan, model: torch.nn.Module) -> Iterator[None]:
        """Know when the model (or a copy of it) is inside of a module whose attention sees all tokens."""
        handles = []
        for spec, blocks in check(plan, model):
            for block in blocks:
                for module in [block] if spec.exchange is None else [attribute(block, name) for name in spec.exchange]:
                    handles.append(module.register_forward_pre_hook(self._enter))
                    handles.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, *_args: Any) -> None:
        self._inside.now = True

    def _leave(self, *_args: Any) -> None:
        self._inside.now = False

    def stock(self, inner: Callable[..., torch.Tensor] | None) -> Callable[..., torch.Tensor]:
        """An override that masks; ``inner``: another pack's, behind it."""
        return self._override(inner or (lambda func, *args, **kwargs: func(*args, **kwargs)), None, 0, self.batch)

    def shared(self, runner: Runner, start: int, stop: int) -> Callable[..., torch.Tensor]:
        """The same in front of a runner's override; ``start``, ``stop``: batch rows of the replica."""
        return self._override(runner.override, runner, start, stop)

    def _override(self, inner: Callable[..., torch.Tensor], runner: Runner | None, start: int, stop: int):
        from comfy.ldm.modules.attention import attention_pytorch

        def override(func, *args, **kwargs):
            if not getattr(self._inside, "now", False):
                return inner(func, *args, **kwargs)
            call = Call.parse(func, args, kwargs)
            assert call.mask is None, "this case has a mask of its own"
            queries, keys = call.q.shape[2], call.k.shape[2]
            forward = runner.hooks.forward if runner is not None else None
            if forward is not None and forward.mesh.sequence.size > 1:
                assert forward.attending
                q, kv = forward.attending[forward._call % len(forward.attending)]
                queries, keys = q.total, kv.total
            mask = made(self.form, self.batch, call.heads, queries, keys)
            mask = mask[start:stop] if self.form[1][0] == "B" else mask
            kwargs = {**kwargs, "mask": mask} if len(args) < 5 else kwargs
            # ComfyUI's own CPU function adds boolean masks as numbers
            return inner(attention_pytorch, *args[:4], *([mask, *args[5:]] if len(args) > 4 else []), **kwargs)

        return override
