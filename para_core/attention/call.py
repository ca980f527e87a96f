"""One call of ComfyUI's attention override, whatever form it has.

ComfyUI calls ``override(func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
skip_output_reshape=False, **kwargs)``; models pass ``heads`` and ``mask`` by position or by name, and one of the stock
functions names its tensors ``query, key, value``. Shapes: B batch, H heads, S query rows, M key rows, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

_POSITIONS = ("q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")
_CONSUMED = frozenset((*_POSITIONS, "query", "key", "value", "scale"))


@dataclass(slots=True, eq=False)
class Call:
    """The tensors of one call as ``(B, heads, rows, D)`` views, and what its caller expects back. Treat as frozen."""

    func: Callable[..., torch.Tensor]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    q: torch.Tensor
    """``(B, H, S, D)``."""
    k: torch.Tensor
    """``(B, Hkv, M, D)``."""
    v: torch.Tensor
    """``(B, Hkv, M, D)``."""
    mask: torch.Tensor | None
    """As it came: ``(S, M)``, ``(B|1, S, M)`` or ``(B|1, H|1, S|1, M)``, bool (True = attend) or additive."""
    scale: float | None
    attn_precision: torch.dtype | None
    skip_reshape: bool
    skip_output_reshape: bool
    low_precision: bool
    """False where the model forbids kernels that quantise (``low_precision_attention=False``)."""

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def transformer_options(self) -> dict[str, Any]:
        return self.kwargs.get("transformer_options") or {}

    @property
    def extra(self) -> dict[str, Any]:
        """The keywords besides tensors, mask, scale and layout: what a wrapped function must still be given."""
        return {name: value for name, value in self.kwargs.items() if name not in _CONSUMED}

    @classmethod
    def parse(cls, func: Callable[..., torch.Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Read the arguments of ``override(func, *args, **kwargs)``; tensors become views, never copies.

        Raises ``TypeError`` for a call without q, k, v and heads, ``ValueError`` for widths that are no multiple of the head dim.
        """
        get = kwargs.get
        count = len(args)
        if count >= 4:
            q, k, v, heads = args[:4]
            if count > len(_POSITIONS):
                raise TypeError(f"an attention call has at most {len(_POSITIONS)} positional arguments, got {count}")
        else:
            q = args[0] if count > 0 else get("q", get("query"))
            k = args[1] if count > 1 else get("k", get("key"))
            v = args[2] if count > 2 else get("v", get("value"))
            heads = get("heads")
            if q is None or k is None or v is None or heads is None:
                raise TypeError("an attention call needs q, k, v and heads")
        skip_reshape = bool(args[6] if count > 6 else get("skip_reshape", False))
        if not skip_reshape:
            batch, rows, width = q.shape
            dim = width // heads
            if dim * heads != width:
                raise ValueError(f"query width {width} is not divisible by {heads} heads")
            q = q.view(batch, rows, heads, dim).transpose(1, 2)
            k = _split_heads(k, dim)
            v = _split_heads(v, dim)
        return cls(
            func,
            args,
            kwargs,
            q,
            k,
            v,
            args[4] if count > 4 else get("mask"),
            get("scale"),
            args[5] if count > 5 else get("attn_precision"),
            skip_reshape,
            bool(args[7] if count > 7 else get("skip_output_reshape", False)),
            get("low_precision_attention") is not False,
        )

    def output(self, out: torch.Tensor) -> torch.Tensor:
        """``(B, H, S, D)`` as the caller wants it: the same, or ``(B, S, H * D)`` (no copy where memory is ``(B, S, H, D)``)."""
        return out if self.skip_output_reshape else out.transpose(1, 2).flatten(2)


def _split_heads(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """``(B, S, H * D)``, or ``(B, S, H, D)`` as some models leave k and v, as a ``(B, H, S, D)`` view."""
    if tensor.ndim == 4:
        return tensor.transpose(1, 2)
    batch, rows, width = tensor.shape
    heads = width // dim
    if heads * dim != width:
        raise ValueError(f"key or value width {width} is not divisible by the head dimension {dim}")
    return tensor.view(batch, rows, heads, dim).transpose(1, 2)


def stock(call: Call, previous: Callable[..., torch.Tensor] | None = None) -> torch.Tensor:
    """Answer ``call`` exactly as without this pack: by the override that was there before, else by the stock function."""
    if previous is not None:
        return previous(call.func, *call.args, **call.kwargs)
    return call.func(*call.args, **call.kwargs)


@dataclass(frozen=True, eq=False)
class StockKernel:
    """The stock function, or a previous override, as the local kernel of one call.

    ``lse``: computes ``(out, log-sum-exp)`` where the ring needs it; None for a foreign override, whose arithmetic is unknown.
    """

    call: Call
    previous: Callable[..., torch.Tensor] | None = None
    lse: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None

    @property
    def has_lse(self) -> bool:
        return self.lse is not None

    def original(self) -> torch.Tensor:
        """The whole call with the caller's own arguments and output layout: bit-identical to stock."""
        return stock(self.call, self.previous)

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None, scale: float | None) -> torch.Tensor:
        """Attention of other rows or heads than the call's: q ``(B, h, S, D)``, k and v ``(B, hkv, M, D)`` -> ``(B, h, S, D)``."""
        kwargs = self.call.extra
        # Without this flag a wrapped stock function would call the override again.
        kwargs["_inside_attn_wrapper"] = True
        if scale is not None:
            kwargs["scale"] = scale
        kwargs.update(mask=mask, attn_precision=self.call.attn_precision, skip_reshape=True, skip_output_reshape=True)
        if self.previous is not None:
            return self.previous(self.call.func, q, k, v, q.shape[1], **kwargs)
        return self.call.func(q, k, v, q.shape[1], **kwargs)

    def run_lse(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None, scale: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.lse is not None, "callers look at has_lse first"
        return self.lse(q, k, v, mask=mask, scale=scale)
