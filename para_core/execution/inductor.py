"""torch's own compiler, given blocks as it does best with them."""

from __future__ import annotations

from typing import Any

import torch

from .rotary import decompositions


def inductor(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
    """``torch.compile``'s inductor, with rotary embeddings as formulas and the rewrites of ``rewrites``."""
    from torch._inductor.compile_fx import compile_fx  # seconds to import, and only compiling runs need them
    from torch._inductor.decomposition import select_decomp_table

    from .rewrites import rewrite

    rewrite(graph)
    return compile_fx(graph, inputs, decompositions={**select_decomp_table(), **decompositions()})


def for_ranks(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
    """``inductor`` for runs of several ranks: what can be computed while messages travel is."""
    from .parallel_mlp import compute_mlp_beside_attention

    if compute_mlp_beside_attention(graph.graph):
        graph.recompile()
    return inductor(graph, inputs)
