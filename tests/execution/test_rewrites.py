"""Rewrites of a block's graph: the same numbers, found where they should be, and nothing touched where they should not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from env.rewriting import Rewriting

D, E = 12, 20


@pytest.fixture
def rewritten(comfy, monkeypatch):
    """Compile a function, its graph rewritten as on a card. Returns the compiled one and how often each rewrite applied."""
    torch._dynamo.reset()

    def compiled(function):
        backend = Rewriting(monkeypatch)
        return torch.compile(function, fullgraph=True, backend=backend), backend.applied

    yield compiled
    torch._dynamo.reset()


def weights(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape) for shape in shapes]


def agree(function, rewritten, *given, **expected: int) -> torch.Tensor:
    compiled, applied = rewritten(function)
    with torch.inference_mode():
        stock = function(*(tensor.clone() for tensor in given))
        result = compiled(*(tensor.clone() for tensor in given))
    assert {name: count for name, count in applied.items() if count} == expected
    assert torch.allclose(result, stock, rtol=1e-5, atol=1e-5)
    return result


@pytest.mark.parametrize("leading", [(5,), (2, 7), (2, 3, 5)])
def test_gelu_ends_the_layer_before_it(rewritten, leading):
    def mlp(x, w, b):
        return F.gelu(F.linear(x, w, b), approximate="tanh") * 2

    agree(mlp, rewritten, *weights((*leading, D), (E, D), (E,)), activate_in_linear=1)


@pytest.mark.parametrize("text, image", [(3, 5), (1, 8), (7, 1)])
@pytest.mark.parametrize("order", [(2, "tokens last"), (1, "tokens first")], ids=lambda order: order[1])
@pytest.mark.parametrize("name", ["apply_rope", "apply_rope1", "apply_rope_split_half", "apply_rope_split_half1"])
def test_streams_are_rotated_before_they_are_joined(rewritten, name, order, text, image):
    import comfy_kitchen

    dim, rotate = order[0], getattr(comfy_kitchen, name)
    shape = [2, 3, 3, 16]

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(count if place == dim else size for place, size in enumerate(shape))

    table = [1, 1, 1, 8, 2, 2]
    table[dim] = text + image

    def attend(tq, iq, tk, ik, table):
        q, k = torch.cat((tq, iq), dim=dim), torch.cat((tk, ik), dim - 4)
        return torch.cat([rotate(q, table), rotate(k, table)]) if name.endswith("1") else torch.cat(rotate(q, k, table))

    given = weights(*map(tokens, (text, image, text, image)), tuple(table))
    agree(attend, rewritten, *given, rotate_before_joining=2 if name.endswith("1") else 1)


def test_what_was_joined_lies_as_attention_takes_it(rewritten):
    import comfy_kitchen

    def attend(text, image, table):
        q = torch.cat((text, image), dim=2)
        return comfy_kitchen.apply_rope(q, q, table)[0]

    given = weights((1, 3, 4, 16), (1, 3, 5, 16), (1, 1, 9, 8, 2, 2))
    result = agree(attend, rewritten, *given, rotate_before_joining=1)
    assert result.transpose(1, 2).is_contiguous()


def two_uses(x, w, b):
    y = F.linear(x, w, b)
    return F.gelu(y, approximate="tanh") + y


def other_gelu(x, w, b):
    return F.gelu(F.linear(x, w, b))


def no_bias(x, w, b):
    return F.gelu(F.linear(x, w), approximate="tanh") + b


def written_between(x, w, b):
    y = F.linear(x, w, b)
    x.mul_(3)
    return F.gelu(y, approximate="tanh") + F.linear(x, w)


@pytest.mark.parametrize("function", [two_uses, other_gelu, no_bias, written_between], ids=lambda function: function.__name__)
def test_what_looks_otherwise_stays(rewritten, function):
    agree(function, rewritten, *weights((2, 7, D), (E, D), (E,)))


def test_what_is_written_in_place_without_a_use_stays_in_the_graph(rewritten):
    def block(x, w, b, w2):
        x = x * 1
        x.addcmul_(F.linear(F.gelu(F.linear(x, w, b), approximate="tanh"), w2), x)
        return x

    agree(block, rewritten, *weights((2, 7, D), (E, D), (E,), (D, E)), activate_in_linear=1)


def test_a_table_for_other_tokens_is_not_cut(rewritten):
    """Longer than the tokens, or one for all of them."""
    import comfy_kitchen

    def attend(text, image, table):
        return comfy_kitchen.apply_rope1(torch.cat((text, image), dim=2), table)

    for rows in (11, 1):
        agree(attend, rewritten, *weights((1, 3, 4, 16), (1, 3, 5, 16), (1, 1, rows, 8, 2, 2)))


def test_sizes_may_change(rewritten):
    def mlp(x, w, b):
        return F.gelu(F.linear(x, w, b), approximate="tanh")

    compiled, applied = rewritten(mlp)
    given = weights((E, D), (E,))
    with torch.inference_mode():
        for count in (3, 5, 8, 13):
            x = torch.randn(2, count, D)
            assert torch.allclose(compiled(x, *given), mlp(x, *given), atol=1e-5)
    assert 1 <= applied["activate_in_linear"] <= 2  # once for a size, then once for all


def test_on_the_cpu_and_in_full_precision_layers_stay(comfy):
    from para_core.execution.rewrites import fits

    assert not fits(torch.zeros(1), torch.zeros(1))
    assert not fits(torch.zeros(1, dtype=torch.bfloat16))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_card_the_matrix_kernel_computes_gelu():
    x, w, b = (tensor.cuda().bfloat16() for tensor in weights((64, 128), (256, 128), (256,)))
    exact = F.gelu(F.linear(x.double(), w.double(), b.double()), approximate="tanh")
    stock = F.gelu(F.linear(x, w, b), approximate="tanh").double()
    result = torch._addmm_activation(b, x, w.t(), use_gelu=True).double()
    assert (result - exact).norm() <= 1.01 * (stock - exact).norm()
