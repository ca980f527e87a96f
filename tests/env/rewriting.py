"""A compiler that rewrites graphs on the CPU as it would on a card, and then only traces."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.debugging import aot_eager


class Rewriting:
    """``torch.compile``'s backend. ``applied``: how often each rewrite was made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        from para_core.execution import rewrites

        def plain(*tensors: Any) -> bool:
            return all(type(tensor) in (torch.Tensor, torch.nn.Parameter, rewrites.FakeTensor) for tensor in tensors)

        def linear_gelu(bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *, use_gelu: bool) -> torch.Tensor:
            assert use_gelu
            return F.gelu(torch.addmm(bias, x, weight), approximate="tanh")

        monkeypatch.setattr(rewrites, "fits", plain)
        monkeypatch.setattr(torch, "_addmm_activation", linear_gelu)  # computes another form of GELU on the CPU
        self._rewrite = rewrites.rewrite
        self.applied: Counter[str] = Counter()

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.applied.update(self._rewrite(graph))
        graph.graph.lint()
        return aot_eager(graph, inputs)


class ForRanks:
    """``torch.compile``'s backend for blocks that ranks share: rewrites graphs as for them, and then only traces."""

    def __init__(self) -> None:
        self.applied = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        from para_core.execution.parallel_mlp import compute_mlp_beside_attention

        self.applied += compute_mlp_beside_attention(graph.graph)
        graph.graph.lint()
        graph.recompile()
        return graph
