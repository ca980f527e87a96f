"""Rotary embeddings as formulas: the same numbers as comfy-kitchen's operations, and no such operation in compiled blocks."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

Q, K = (2, 3, 7, 16), (2, 3, 7, 16)


def arguments(name: str, dtype: torch.dtype) -> tuple:
    torch.manual_seed(0)
    table = torch.randn(1, 1, 9, 8, 2, 2)  # longer than the tokens: the rest is not used
    if "split_half" in name:
        table = table[:, :, :7]
    tokens = [torch.randn(shape, dtype=dtype) for shape in (Q, K)]
    scales = [torch.randn(16, dtype=dtype) for _ in range(2)]
    if name.endswith("1"):
        return (tokens[0], table, *scales[:1]) if name.startswith("rms") else (tokens[0], table)
    return (*tokens, table, *scales) if name.startswith("rms") else (*tokens, table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["apply_rope", "apply_rope1", "apply_rope_split_half", "apply_rope_split_half1",
                                  "rms_rope", "rms_rope1", "rms_rope_split_half", "rms_rope_split_half1"])  # fmt: skip
def test_each_formula_is_its_operation(comfy, name, dtype):
    import comfy_kitchen

    from para_core.execution.rotary import FORMULAS, decompositions

    given = arguments(name, dtype)
    expected, result = getattr(comfy_kitchen, name)(*given), FORMULAS[name](*given)
    assert getattr(torch.ops.comfy_kitchen, name).default in decompositions()
    rounding = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for one, other in zip(*((found,) if isinstance(found, torch.Tensor) else found for found in (result, expected)), strict=True):
        assert one.dtype == other.dtype and torch.allclose(one.float(), other.float(), rtol=rounding, atol=1e-5)


def test_a_part_of_the_head_dim_can_be_rotated(comfy):
    import comfy_kitchen

    from para_core.execution.rotary import FORMULAS

    q, k, table, *scales = arguments("rms_rope_split_half", torch.float32)
    given = (q, k, table[..., :4, :, :], *scales, 1e-6, 8)
    for one, other in zip(FORMULAS["rms_rope_split_half"](*given), comfy_kitchen.rms_rope_split_half(*given), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_compiled_graph_holds_formulas(comfy):
    import comfy_kitchen

    from para_core.execution.rotary import decompositions

    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    given = arguments("apply_rope", torch.float32)
    torch._dynamo.reset()
    for table in ({}, decompositions()):
        compiled = torch.compile(comfy_kitchen.apply_rope, fullgraph=True, backend=aot_autograd(fw_compiler=keep, decompositions=table))
        with torch.inference_mode():
            result = compiled(*given)
        assert torch.allclose(result[0], comfy_kitchen.apply_rope(*given)[0], atol=1e-5)
        torch._dynamo.reset()
    opaque, written = (any("comfy_kitchen" in str(node.target) for node in graph.graph.nodes) for graph in graphs)
    assert opaque and not written
