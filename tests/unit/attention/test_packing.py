"""Messages packed and unpacked by kernels equal those of plain copies: Triton's interpreter runs them, where Triton is installed.

On a card ``test_cuda.py`` does the same with compiled ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from para_core.attention import packing

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import threading
import torch
from para_core.attention import packing, packing_kernels, ulysses
from para_core.attention.message import ROWS
from para_core.attention.traffic import Traffic
from para_core.sequence.layout import balanced
from unit.fake_comm import fake_comms, on_ranks

lock, used = threading.Lock(), []  # the interpreter is for one thread at a time
packing.kernels = lambda device: packing_kernels

def locked(function):
    def run(*args, **kwargs):
        with lock:
            used.append(function.__name__)
            function(*args, **kwargs)
    return run

packing.pack, packing.unpack = locked(packing.pack), locked(packing.unpack)

def trade(comms, rank, tensors, rows, split):
    q, k, v = tensors[rank]
    own = ulysses.Trade(ROWS, rank, q.shape[0], q.shape[3], rows, rows, split)
    arrived = ulysses.scatter(comms[rank], own, q, k, v, Traffic())()
    whole = q.new_empty(q.shape[0], rows[rank], q.shape[1], q.shape[3])
    ulysses.gather(comms[rank], own, arrived[0], whole, Traffic())()
    return [*(tensor.clone() for tensor in arrived), whole]

for batch, heads, kv_heads, most, dim in [(1, 12, 12, 3, 64), (2, 12, 12, 2, 16), (1, 24, 12, 2, 20), (1, 48, 48, 1, 4), (1, 2, 2, 2, 8)]:
    for ranks in (2, 3, 4):
        if kv_heads % ranks:
            continue
        rows = tuple(balanced(ranks * most - (most > 1), ranks))
        joined = [torch.randn(batch, own, heads + 2 * kv_heads, dim).transpose(1, 2) for own in rows]
        tensors = [each.split((heads, kv_heads, kv_heads), dim=1) for each in joined]
        split, results = ulysses.split_heads(heads, kv_heads, ranks), []
        for usable in (True, False):
            packing.possible = lambda *_, usable=usable: usable
            comms = fake_comms(ranks)
            results.append(on_ranks(ranks, lambda rank: trade(comms, rank, tensors, rows, split), comms))
        assert sorted(set(used)) == ["pack", "unpack"] and used.clear() is None
        for packed, plain, (q, _, _) in zip(*results, tensors, strict=True):
            assert all(torch.equal(*pair) for pair in zip(packed, plain, strict=True)), (batch, heads, kv_heads, ranks)
            assert torch.equal(packed[3], q.transpose(1, 2)), "what comes back is what was sent"
print("equal")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_kernels_do_what_plain_copies_do() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.stdout.strip() == "equal", done.stderr[-3000:]


def test_on_the_cpu_copies_are_plain() -> None:
    assert not packing.possible(torch.zeros(1, 2, 3, 4))
