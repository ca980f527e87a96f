"""The attention override of a sampling run: what ComfyUI calls in place of its attention function, and compiled blocks in theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
from ..sequence.hooks import Hooks
from ..sequence.layout import Joint
from ..sequence.mesh import Mesh
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
        """Called after every call that is ours."""
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
        forward = self.hooks.forward if self.hooks is not None else None
        if exchange is not None and call.mask is not None and forward is not None and forward.cut.exact:
            call = replace(call, low_precision=False, kwargs={**call.kwargs, "low_precision_attention": False})
        way = PLAIN if exchange is None else self.ways.way(exchange, call, self._where(), beside)
        out = attend_call(exchange, call, self.chooser.kernel(call), way, beside)
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
