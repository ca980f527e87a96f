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
from para_core.attention import packing, packing_kernels
from unit.packed import packs_like_copies

packing.kernels, packing.possible = lambda device: packing_kernels, lambda *_: True
for shape in [(1, 12, 12, 3, 64), (2, 12, 12, 2, 16), (1, 24, 12, 2, 20), (1, 48, 48, 1, 4), (1, 2, 2, 2, 8)]:
    for ranks in (2, 3, 4):
        for parts in (1, 2, 4):
            if shape[2] % ranks == 0 and (parts == 1 or shape[2] // ranks >= parts):
                packs_like_copies(shape, ranks, parts=parts)
print("equal")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_kernels_do_what_plain_copies_do() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.stdout.strip() == "equal", done.stderr[-3000:]


def test_on_the_cpu_copies_are_plain() -> None:
    assert not packing.possible(torch.zeros(1, 2, 3, 4))
