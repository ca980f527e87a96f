"""What a message is made of, and what is made of messages, in one kernel each: on CUDA, for shares of equally many heads.

Copying parts of q, k and v to and from their places one by one is a launch each. Here a program takes heads of one token, whose
places in memory are the ones that ``message.Rows`` and ``ulysses.gather`` give them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ..log import log

BLOCK = 32  # heads that a program moves at once, at most


@lru_cache(maxsize=8)
def kernels(device: torch.device) -> Any:
    """The kernels, once they have run on ``device``; None, said in the log, where Triton is missing or cannot compile there."""
    try:
        from . import packing_kernels  # at first use: Triton takes long to import

        tokens = torch.zeros(1, 1, 1, 1, device=device)
        packing_kernels.pack[1, 3, 1](
            tokens, tokens, tokens, tokens, tokens.new_empty(3), *[1] * 9, 1, 1, 1, 0, 1, 1, 0, 1, 0, 1, D=1, DIMS=1, HEADS=BLOCK
        )
    except Exception as error:  # noqa: BLE001  no Triton, no C compiler, no headers, an old card: each raises something else
        log.info("what is exchanged is packed by plain copies: %s", str(error).partition("\n")[0])
        return None
    return packing_kernels


def possible(*tensors: torch.Tensor) -> bool:
    """Whether these can be packed and unpacked here."""
    if not all(tensor.is_cuda and tensor.stride(-1) == 1 and tensor.numel() for tensor in tensors):
        return False
    if torch.cuda.is_current_stream_capturing() and torch.cuda.get_allocator_backend() != "native":
        return False  # Triton asks the driver about every pointer, and it knows none that cudaMallocAsync gives to a capture
    return torch.version.hip is None and kernels(tensors[0].device) is not None


def pack(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sent: torch.Tensor,
    own: torch.Tensor,
    *,
    q_heads: slice,
    kv_heads: slice,
    rank: int,
    ranks: int,
) -> None:
    """Fill ``sent`` with pieces for the other ranks in their order, and ``own`` ``(S, B, q | k | v heads, D)`` with this rank's.

    q ``(B, H, S, D)``, k and v ``(B, Hkv, S, D)`` with as many heads for every one of ``ranks``, of which those in ``q_heads`` and
    ``kv_heads`` are taken. Pieces are laid out as ``own``; ``sent`` is flat.
    """
    batch, heads, rows, dim = q.shape
    shares = (heads // ranks, q_heads), (k.shape[1] // ranks, kv_heads)
    most = max(length(q_heads), length(kv_heads)) * ranks
    block = min(BLOCK, _power(most))
    kernels(q.device).pack[rows, 3 * batch, -(-most // block)](
        q, k, v, sent, own, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], rows, batch,
        *(number for share, some in shares for number in (share, some.start, length(some))), rank, ranks,
        D=dim, DIMS=_power(dim), HEADS=block,
    )  # fmt: skip


def unpack(own: torch.Tensor, received: torch.Tensor, whole: torch.Tensor, *, heads: slice, rank: int) -> None:
    """Fill every rank's ``heads`` of ``whole`` ``(B, S, H, D)`` with this rank's ``own`` ``(B, h, S, D)`` and the others', ``received``
    as flat pieces ``(S, B, h, D)`` in their order. All ranks have equally many, and of each ``heads`` are meant."""
    batch, rows, all_heads, dim = whole.shape
    count = length(heads)
    ranks = 1 + received.numel() // max(1, rows * batch * count * dim)
    block = min(BLOCK, _power(count * ranks))
    kernels(own.device).unpack[rows, batch, -(-count * ranks // block)](
        own, received, whole, *own.stride()[:3], rows, batch, all_heads // ranks, heads.start, count, rank, ranks,
        D=dim, DIMS=_power(dim), HEADS=block,
    )  # fmt: skip


def length(heads: slice) -> int:
    """How many heads that are."""
    return heads.stop - heads.start


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()
