"""Attention as one opaque operation of compiled code, alone or with the layers of an MLP that stands beside it.

Everything that the operations need of a run stays outside of compiled code, behind a number.
"""

from __future__ import annotations

import threading
from itertools import count
from weakref import WeakValueDictionary

import torch

from .override import AttentionOverride
from .parallel_mlp import Mlp

_runs: WeakValueDictionary[int, AttentionOverride] = WeakValueDictionary()
_lock = threading.Lock()


def number(attend: AttentionOverride) -> int:
    """A number for ``attend`` while it lives: the lowest one free, so that a later run finds compiled code of an earlier."""
    with _lock:
        found = next(candidate for candidate in count() if candidate not in _runs)
        _runs[found] = attend
    return found


def _numbered(run: int) -> AttentionOverride:
    attend = _runs.get(run)
    if attend is None:
        raise RuntimeError(f"attention run {run} is gone: its sampling run has ended")
    return attend


CALL = "Tensor q, Tensor k, Tensor v, Tensor? mask, float? scale, int run, int? place, bool low_precision"
BESIDE = "Tensor x, Tensor up, Tensor? up_bias, bool gated, Tensor down, Tensor? down_bias, bool attention_first"
"""Arguments of the operations, with their types."""


@torch.library.custom_op("paradit::attention", mutates_args=(), schema=f"({CALL}) -> Tensor")
def attention(q, k, v, mask, scale, run, place, low_precision) -> torch.Tensor:
    """q ``(B, H, S, D)``, k and v ``(B, Hkv, M, D)`` -> ``(B, H, S, D)``, memory ``(B, S, H, D)``."""
    out = _numbered(run).compute(q, k, v, mask, scale, place=place, low_precision=low_precision)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@attention.register_fake
def _(q, *_) -> torch.Tensor:
    batch, heads, rows, dim = q.shape
    return q.new_empty(batch, rows, heads, dim).transpose(1, 2)


@torch.library.custom_op("paradit::attention_and_mlp", mutates_args=(), schema=f"({CALL}, {BESIDE}) -> Tensor")
def attention_and_mlp(
    q, k, v, mask, scale, run, place, low_precision, x, up, up_bias, gated, down, down_bias, attention_first
) -> torch.Tensor:
    """``linear(cat(attention, activation(linear(x, up, up_bias))), down, down_bias)``: x ``(B, S, C)`` -> ``(B, S, E)``.

    up ``(F, C)``; down ``(E, H * D + features)``: its columns for attention are the first or the last ones. ``gated``: see ``Mlp``,
    which is computed while messages of attention travel. It is one operation, so that nothing of a call is under way once it has
    ended, however it ends, and no compiler can put its parts in another order.
    """
    width = q.shape[1] * v.shape[3]
    first, last = down.tensor_split((width if attention_first else -width,), dim=1)
    columns, rest = (first, last) if attention_first else (last, first)
    mlp = Mlp(x, up, up_bias, rest, down_bias, gated=gated)
    out = _numbered(run).compute(q, k, v, mask, scale, place=place, low_precision=low_precision, beside=mlp)
    return mlp.plus(out.transpose(1, 2).flatten(2), columns)


@attention_and_mlp.register_fake
def _(q, k, v, mask, scale, run, place, low_precision, x, up, up_bias, gated, down, down_bias, attention_first) -> torch.Tensor:
    return x.new_empty(x.shape[0], x.shape[1], down.shape[0])
