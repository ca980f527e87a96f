"""Captures that fail, on a real GPU: run this file where there is one. Skipped elsewhere.

Each runs in a process of its own, because one of them may end it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

ROOT = Path(__file__).resolve().parents[2]
FAILS = {
    "raises": 'raise RuntimeError("no")',
    "is called off": "torch.cuda.current_stream().synchronize()",
    "is cancelled": "raise KeyboardInterrupt",
}
SCRIPT = """
import gc, sys
sys.path.insert(0, {root!r})
import torch
from para_core.execution.graphs import Graphs

def forward(x):
    y = (x @ x).tanh()
    if torch.cuda.is_current_stream_capturing() and failing:
        {fails}
    return y @ y

def run(graphs, x):
    result = [graphs.run(forward, (x,), {{}}) for _ in range(3)][-1]
    assert torch.allclose(result, forward(x)), "another result"

failing = False
x = torch.randn(2048, 2048, device="cuda") / 64
run(Graphs(print), x)
levels = []
for failing in (True, True, False, False):
    graphs = Graphs(print)
    try:
        run(graphs, x)
    except KeyboardInterrupt:
        print("cancelled")
    graphs.drop()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    levels.append(torch.cuda.memory_reserved())
print("alive", len(set(levels)), graphs.replays, flush=True)
"""


def outcome(allocator: str, fails: str) -> subprocess.CompletedProcess[str]:
    script = SCRIPT.format(root=str(ROOT), fails=FAILS[fails])
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": f"backend:{allocator}"}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("fails", FAILS)
def test_a_capture_that_fails_leaves_the_process_and_its_memory_as_they_were(fails: str) -> None:
    done = outcome("native", fails)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "alive 1 2", done.stdout + done.stderr[-2000:]


def test_under_cudaMallocAsync_it_ends_the_process_which_is_why_there_are_no_graphs() -> None:
    """If this fails, torch has changed, and ``compiling.against_graphs`` may allow them."""
    assert any(outcome("cudaMallocAsync", fails).returncode != 0 for fails in FAILS)
