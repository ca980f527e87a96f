"""Messages that kernels pack and unpack, beside those of plain copies: on a card, or in Triton's interpreter."""

from __future__ import annotations

import threading
from collections.abc import Callable
from unittest.mock import patch

import torch
from unit.fake_comm import FakeComm, fake_comms, on_ranks

from para_core.attention import packing, ulysses
from para_core.attention.message import ROWS
from para_core.attention.traffic import Traffic
from para_core.sequence.layout import balanced


def packs_like_copies(shape: tuple[int, int, int, int, int], ranks: int, *, parts: int = 1, device="cpu", dtype=torch.float32) -> None:
    """Trade there and back on ``ranks``, with kernels and without: the same bits. shape: B, H, Hkv, the most rows of a rank, D.

    parts: in so many every rank's heads are cut, each a trade of its own.
    """
    batch, heads, kv_heads, most, dim = shape
    rows, split = tuple(balanced(ranks * most - (most > 1), ranks)), ulysses.split_heads(heads, kv_heads, ranks)
    torch.manual_seed(0)
    joined = [torch.randn(batch, own, heads + 2 * kv_heads, dim).to(device, dtype).transpose(1, 2) for own in rows]
    tensors = [each.split((heads, kv_heads, kv_heads), dim=1) for each in joined]
    used: set[str] = set()
    lock = threading.Lock()  # the interpreter is for one thread at a time

    def noted(function: Callable[..., None]) -> Callable[..., None]:
        def run(*args, **kwargs) -> None:
            with lock:
                used.add(function.__name__)
                function(*args, **kwargs)

        return run

    def trade(comm: FakeComm) -> list[torch.Tensor]:
        q, k, v = tensors[comm.rank]
        whole, kept = q.new_full((batch, rows[comm.rank], heads, dim), float("nan")), []
        for part in range(parts):
            own = ulysses.Trade(ROWS, comm.rank, batch, dim, rows, rows, split, part, parts)
            arrived = ulysses.scatter(comm, own, q, k, v, Traffic())()
            ulysses.gather(comm, own, arrived[0], whole, Traffic())()
            kept += [tensor.clone() for tensor in arrived]
        return [*kept, whole]

    def traded(possible: Callable[..., bool]) -> list[list[torch.Tensor]]:
        comms = fake_comms(ranks)
        with patch.multiple(packing, possible=possible, pack=noted(packing.pack), unpack=noted(packing.unpack)):
            return on_ranks(ranks, lambda rank: trade(comms[rank]), comms)

    plain = traded(lambda *_: False)
    assert not used and packing.possible(*tensors[0])
    packed = traded(packing.possible)
    assert used == {"pack", "unpack"}
    for one, other, (q, _, _) in zip(packed, plain, tensors, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True)), (shape, ranks)
        assert torch.equal(one[-1], q.transpose(1, 2)), "what comes back is what was sent"
