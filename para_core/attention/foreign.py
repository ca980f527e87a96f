"""Another node's attention override where ranks share a forward: only the first rank has it, and it may do anything.

So the call is brought together there as stock code would have made it (all rows in natural order, all heads, the whole
mask), the override answers it, and every rank gets its rows back. Exact whatever the override does; attention itself is
not shared then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..sequence.cut import Cut, Segments, TokenError
from ..sequence.first import collect, hand_out, whole_slice
from ..sequence.hooks import Forward
from ..sequence.mesh import Comm
from .call import Call
from .masks import as_4d

LONG = {"q": "query", "k": "key", "v": "value"}  # names that one of the stock functions uses
MASK = 4  # the mask's place among positional arguments


def attend_on_first(call: Call, forward: Forward, stream: str, previous: Callable[..., torch.Tensor] | None) -> torch.Tensor:
    """The rows of this rank in what ``previous`` makes of the whole call; it is None on all ranks but the first.

    stream: the segment that ``img_slice`` of the transformer options is about. Raises TokenError for a call whose rows nobody knows.
    """
    cut, comm = forward.cut, forward.mesh.sequence
    rows: Segments = ()
    keys: Segments = ()
    if forward.pair() is not None:
        rows, keys = forward.joint()
    elif forward.crossing:
        rows = forward.crossing
    elif forward.inside is not None:
        raise TokenError("another node's attention override meets an attention call that cannot be gathered")
    q = collect(cut, comm, call.q, rows, 2) if rows else call.q
    k, v = (collect(cut, comm, tensor, keys, 2) if keys else tensor for tensor in (call.k, call.v))
    mask = call.mask if call.mask is None else _whole_mask(call.mask, cut, comm, rows, keys)
    dim = 2 if call.skip_output_reshape else 1
    batch, heads, count, _ = call.q.shape
    depth = call.v.shape[3]
    like = call.q.new_empty((batch, heads, count, depth) if dim == 2 else (batch, count, heads * depth))
    out = None
    if comm.rank == 0:
        assert previous is not None and q is not None and k is not None and v is not None
        options = call.transformer_options
        whole_args, whole_kwargs = _arguments(call, {"q": q, "k": k, "v": v}, mask)
        with whole_slice(options, cut, rows, stream):
            out = previous(call.func, *whole_args, **whole_kwargs)
        wanted = [q.shape[2] if place == dim else side for place, side in enumerate(like.shape)]
        if list(out.shape) != wanted or out.dtype != like.dtype:
            raise TokenError(f"an attention override gave {out.dtype} {tuple(out.shape)} instead of {like.dtype} {tuple(wanted)}")
    if rows:
        return hand_out(cut, comm, out, like, rows, dim)
    result = like if out is None else out.contiguous()
    comm.broadcast(result)
    return result


def _arguments(call: Call, tensors: dict[str, torch.Tensor], mask: torch.Tensor | None) -> tuple[list, dict[str, Any]]:
    """The caller's own arguments, in the caller's own layout, with whole tensors."""
    args, kwargs = list(call.args), dict(call.kwargs)
    given = [(name, tensor if call.skip_reshape else tensor.transpose(1, 2).flatten(2)) for name, tensor in tensors.items()]
    for place, (name, value) in enumerate(given):
        if place < len(args):
            args[place] = value
        else:
            kwargs[name if name in kwargs else LONG[name]] = value
    if len(args) > MASK:
        args[MASK] = mask
    elif mask is not None:
        kwargs["mask"] = mask
    return args, kwargs


def _whole_mask(mask: torch.Tensor, cut: Cut, comm: Comm, rows: Segments, keys: Segments) -> torch.Tensor | None:
    """On the first rank the mask of the whole call, from one that may have this rank's rows or columns only.

    Raises TokenError for a mask cut in both: no rank has the rest of it.
    """
    local = []
    for dim, segments, broadcast in ((2, rows, 1), (3, keys, None)):
        if segments and as_4d(mask).shape[dim] not in (broadcast, cut.joint(segments).total):
            local.append((dim, segments))
    if len(local) > 1:
        raise TokenError(f"an attention mask {tuple(mask.shape)} cannot be made whole")
    if not local:
        return mask
    ((dim, segments),) = local
    mask = as_4d(mask)
    whole = collect(cut, comm, mask.view(torch.uint8) if mask.dtype == torch.bool else mask, segments, dim)
    return None if whole is None else whole.view(mask.dtype)
