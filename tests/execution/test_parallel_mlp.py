"""Blocks whose MLP stands beside attention: found where they are, the same numbers, computed while messages travel."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from env.rewriting import ForRanks
from unit.fake_comm import Recorder, fake_meshes, on_ranks
from unit.shared_attention import ExactKernel

from para_core.attention.exchange import Exchange, attend
from para_core.execution import operation, parallel_mlp
from para_core.execution.parallel_mlp import Mlp
from para_core.sequence.layout import Joint
from para_core.sequence.mesh import Mesh

HEADS, DIM, WIDTH, FEATURES = 3, 4, 12, 20


class Attend:
    """Attention of a run. ``launches``: what stands beside it is launched as by an exchange, else left to the operation."""

    def __init__(self, *, launches: bool = True):
        self.launches, self.calls = launches, 0

    def compute(self, q, k, v, mask, scale, *, place, low_precision, beside=None):
        if beside is not None:
            self.calls += 1
            if self.launches:
                beside.there()
                beside.back()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def gelu(x):
    return F.gelu(x, approximate="tanh")


def gate(x):
    first, second = x.chunk(2, dim=-1)
    return F.silu(first) * second


def joined(attention, features):
    return torch.cat((attention, features), 2)


def features_first(attention, features):
    return torch.cat((features, attention), -1)


def unchanged(qkv, mlp, attention):
    return mlp, attention


def nothing(*_):
    return 0


def block(run: int, *, activation=gelu, join=joined, features_last=True, change=unchanged, more=nothing):
    """A function like FLUX's single block without its norms. ``change`` and ``more`` do something else with its parts."""
    wide = FEATURES * (2 if activation is gate else 1)

    def forward(x, w1, b1, w2, b2):
        sizes = [3 * WIDTH, wide] if features_last else [wide, 3 * WIDTH]
        first, second = torch.split(F.linear(x, w1, b1), sizes, dim=-1)
        qkv, mlp = (first, second) if features_last else (second, first)
        q, k, v = qkv.view(*qkv.shape[:2], 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        attention = torch.ops.paradit.attention(2 * q, k, v, None, None, run, 0, True).transpose(1, 2).flatten(2)
        mlp, attention = change(qkv, mlp, attention)
        activated = activation(mlp)
        return x + F.linear(join(attention, activated), w2, b2) + more(attention, mlp, activated)

    return forward


def given(*, activation=gelu, bias=True, batch=2, rows=7) -> list[torch.Tensor | None]:
    torch.manual_seed(0)
    wide = 3 * WIDTH + FEATURES * (2 if activation is gate else 1)
    x, w1, w2 = torch.randn(batch, rows, WIDTH), torch.randn(wide, WIDTH) / 3, torch.randn(WIDTH, WIDTH + FEATURES) / 3
    return [x, w1, torch.randn(wide) if bias else None, w2, torch.randn(WIDTH) if bias else None]


def agree(function, tensors, attend: Attend, *, applied: int) -> None:
    torch._dynamo.reset()
    backend = ForRanks()
    with torch.inference_mode():
        expected = function(*tensors)
        result = torch.compile(function, fullgraph=True, backend=backend)(*tensors)
    assert backend.applied == applied and attend.calls == applied
    assert torch.allclose(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("launches", [True, False], ids=["exchanged", "alone"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", [gelu, gate], ids=lambda function: function.__name__)
@pytest.mark.parametrize("order", [{}, {"join": features_first}, {"features_last": False}], ids=str)
def test_both_layers_are_taken_apart(order, activation, bias, launches):
    attend = Attend(launches=launches)
    function = block(operation.number(attend), activation=activation, **order)
    agree(function, given(activation=activation, bias=bias), attend, applied=1)


def other_gelu(x):
    return F.gelu(x)


def three_joined(attention, features):
    one, other = features.split((8, FEATURES - 8), dim=-1)
    return torch.cat((attention, one, other), 2)


def twice_joined(attention, features):
    both = torch.cat((attention, features), 2)
    return both + both.flip(2)


CHANGES = {
    "features of attention": lambda qkv, mlp, attention: (mlp * attention.sum(), attention),
    "attention changed": lambda qkv, mlp, attention: (mlp, attention * 2),
    "features of qkv": lambda qkv, mlp, attention: (qkv[..., :FEATURES], attention),
    "written": lambda qkv, mlp, attention: (mlp.mul_(2), attention),
}
MORE = {
    "attention used again": lambda attention, mlp, activated: attention,
    "features used again": lambda attention, mlp, activated: mlp[..., :WIDTH],
    "activated features used again": lambda attention, mlp, activated: activated[..., :WIDTH],
}
OTHERS = [
    {"activation": other_gelu},
    {"activation": torch.sin},
    {"join": three_joined},
    {"join": twice_joined},
    *({"change": change} for change in CHANGES.values()),
    *({"more": more} for more in MORE.values()),
]


@pytest.mark.parametrize("changes", OTHERS, ids=["gelu", "sine", "three", "twice", *CHANGES, *MORE])
def test_what_looks_otherwise_stays(changes):
    attend = Attend()
    agree(block(operation.number(attend), **changes), given(), attend, applied=0)


def attention_of(qkv, run):
    q, k, v = qkv.view(*qkv.shape[:2], 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
    return torch.ops.paradit.attention(q, k, v, None, None, run, 0, True).transpose(1, 2).flatten(2)


def gate_the_other_way_round(run, x, w1, w2):
    qkv, mlp = torch.split(F.linear(x, w1), [3 * WIDTH, 2 * FEATURES], dim=-1)
    first, second = mlp.chunk(2, dim=-1)
    return F.linear(torch.cat((attention_of(qkv, run), F.silu(second) * first), 2), w2)


def half_of_the_gate_used_again(run, x, w1, w2):
    qkv, mlp = torch.split(F.linear(x, w1), [3 * WIDTH, 2 * FEATURES], dim=-1)
    first, second = mlp.chunk(2, dim=-1)
    return F.linear(torch.cat((attention_of(qkv, run), F.silu(first) * second), 2), w2) + second[..., :WIDTH]


def rows_split(run, x, w1, w2):
    qkv, mlp = torch.split(F.linear(x, w1[: 3 * WIDTH]), [x.shape[1] // 2] * 2, dim=1)
    return F.linear(torch.cat((attention_of(qkv, run), gelu(mlp)), 2), w2.repeat(1, 2)[:, : 4 * WIDTH])


def pieces_of_one_size(run, x, w1, w2):
    qkv, mlp = torch.split(F.linear(x, w1[: 3 * WIDTH + FEATURES]), 3 * WIDTH, dim=-1)
    return F.linear(torch.cat((attention_of(qkv, run), gelu(mlp)), 2), w2)


def rows_joined(run, x, w1, w2):
    qkv, mlp = torch.split(F.linear(x, w1[: 4 * WIDTH]), [3 * WIDTH, WIDTH], dim=-1)
    return F.linear(torch.cat((attention_of(qkv, run), gelu(mlp)), 1), w2[:, :WIDTH])


def joined_used_again(run, x, w1, w2):
    qkv, mlp = torch.split(F.linear(x, w1[: 3 * WIDTH + FEATURES]), [3 * WIDTH, FEATURES], dim=-1)
    both = torch.cat((attention_of(qkv, run), gelu(mlp)), 2)
    return F.linear(both, w2) + both[..., :WIDTH]


def first_layer_used_again(run, x, w1, w2):
    both = F.linear(x, w1[: 3 * WIDTH + FEATURES])
    qkv, mlp = torch.split(both, [3 * WIDTH, FEATURES], dim=-1)
    return F.linear(torch.cat((attention_of(qkv, run), gelu(mlp)), 2), w2) + both[..., :WIDTH]


FORWARDS = [
    gate_the_other_way_round,
    half_of_the_gate_used_again,
    rows_split,
    pieces_of_one_size,
    rows_joined,
    joined_used_again,
    first_layer_used_again,
]


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda function: function.__name__)
def test_what_is_no_such_block_stays(forward):
    attend = Attend()
    run = operation.number(attend)
    x, w1, _, w2, _ = given(activation=gate, rows=8)
    agree(lambda *tensors: forward(run, *tensors), [x, w1, w2], attend, applied=0)


def test_what_may_have_been_written_in_between_stays():
    attend = Attend()
    run = operation.number(attend)
    plain = block(run)

    def forward(x, w1, b1, w2, b2):
        x = x * 1

        def change(qkv, mlp, attention):
            x.mul_(3)
            return mlp, attention

        return block(run, change=change)(x, w1, b1, w2, b2) + plain(x, w1, b1, w2, b2)

    agree(forward, given(), attend, applied=1)


class Quantised(torch.Tensor):
    """A weight with behaviour of its own."""


def test_only_plain_tensors_of_one_dtype_are_cut():
    from para_core.execution.rewrites import plain

    half, whole = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2)
    assert plain(half, half) and plain(whole, torch.nn.Parameter(whole))
    assert not plain(half, whole) and not plain(whole, None) and not plain(whole, whole.as_subclass(Quantised))


def test_every_tensor_of_both_layers_must_be_plain(monkeypatch):
    shapes, attend, tensors = [], Attend(), given()
    monkeypatch.setattr(parallel_mlp, "plain", lambda *found: shapes.extend(tuple(tensor.shape) for tensor in found))
    agree(block(operation.number(attend)), tensors, attend, applied=0)
    x, w1, b1, w2, b2 = (tuple(tensor.shape) for tensor in tensors)
    assert shapes == [x, w1, b1, (*x[:2], WIDTH), (*x[:2], FEATURES), w2, b2]


def test_the_operation_declares_what_it_returns():
    attend, (x, w1, b1, w2, b2) = Attend(), given()
    run, q = operation.number(attend), torch.randn(2, HEADS, 7, DIM)
    up, up_bias = w1[3 * WIDTH :], b1[3 * WIDTH :]
    torch.library.opcheck(
        torch.ops.paradit.attention_and_mlp.default, (q, q, q, None, 0.5, run, 0, True, x, up, up_bias, False, w2, b2, True)
    )
    torch.library.opcheck(
        torch.ops.paradit.attention_and_mlp.default, (q, q, q, None, None, run, None, False, x, up, None, False, w2, None, False)
    )


@pytest.mark.parametrize("broken", ["there", "back"])
def test_what_fails_beside_attention_leaves_nothing_behind(broken, monkeypatch):
    """On several ranks too (see ``tests/faults``): the operation owns all that is under way."""
    attend = Attend()
    function, tensors = block(operation.number(attend)), given()
    with torch.inference_mode():
        expected = function(*tensors)
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend=ForRanks())
        with monkeypatch.context() as patch:
            patch.setattr(Mlp, broken, lambda self: (_ for _ in ()).throw(MemoryError("no room")))
            with pytest.raises(MemoryError, match="no room"):
                compiled(*tensors)
        assert torch.allclose(compiled(*tensors), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_gate_is_one_kernel_of_the_real_compiler(comfy):
    """As on a card. A rank may have one row."""
    from para_core.execution.parallel_mlp import compiled_gate

    torch._dynamo.reset()
    for batch, rows in ((2, 7), (1, 5), (1, 1), (3, 11)):
        both = torch.randn(batch, rows, 2 * FEATURES)
        into = torch.empty(batch, rows, FEATURES)
        with torch.inference_mode():
            compiled_gate()(both, into)
        assert torch.allclose(into, gate(both), rtol=1e-5, atol=1e-6)
    assert compiled_gate()._compiled is not None


@pytest.mark.slow
@pytest.mark.parametrize("cpp_wrapper", [False, True], ids=["python", "c++"])
@pytest.mark.parametrize("activation", [gelu, gate], ids=lambda function: function.__name__)
def test_the_real_compiler_agrees_and_copies_no_weight(comfy, activation, cpp_wrapper):
    """Layers are cut by views: kernels of its own read tokens."""
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    from para_core.execution.inductor import for_ranks

    attend = Attend()
    function, tensors = block(operation.number(attend), activation=activation), given(activation=activation)
    torch._dynamo.reset()
    with torch.inference_mode(), config.patch(cpp_wrapper=cpp_wrapper):
        expected = function(*tensors)
        result, codes = run_and_get_code(torch.compile(function, fullgraph=True, backend=for_ranks), *tensors)
    assert torch.allclose(result, expected, rtol=1e-5, atol=1e-5) and attend.calls == 1
    if not cpp_wrapper:
        weights = [index for index, tensor in enumerate(tensors) if tensor.ndim == 2]
        kernels = [line for code in codes for line in code.splitlines() if line.strip().startswith("cpp_fused")]
        assert kernels and not any(f"arg{index}_1" in line for line in kernels for index in weights)


class Ranks:
    """Attention that two ranks share. ``events``: what this one did, in order."""

    def __init__(self, mesh: Mesh, joint: Joint, events: list[str]):
        self.exchange = Exchange(Mesh(mesh.sequence, Recorder(mesh.ulysses, events), mesh.ring), joint, joint, Noted(events))

    def compute(self, q, k, v, mask, scale, *, place, low_precision, beside=None):
        return attend(self.exchange, q, k, v, mask, scale, beside=beside)


class Noted(ExactKernel):
    def __init__(self, events: list[str]):
        super().__init__()
        self.look = lambda *_: events.append("attention")


@pytest.mark.parametrize("backend", [ForRanks, pytest.param("inductor", marks=pytest.mark.slow)], ids=["traced", "inductor"])
def test_compiled_code_launches_the_mlp_while_messages_travel(comfy, backend, monkeypatch):
    from para_core.execution.inductor import for_ranks

    backend = for_ranks if backend == "inductor" else backend()
    events: list[list[str]] = [[], []]
    joint, rank_of = Joint(((3, 4),)), threading.local()
    for name in ("there", "back"):
        original = getattr(Mlp, name)
        monkeypatch.setattr(Mlp, name, lambda mlp, name=name, original=original: (events[rank_of.now].append(name), original(mlp)))
    tensors = given()
    attends = [Ranks(mesh, joint, noted) for mesh, noted in zip(fake_meshes(1, 2), events, strict=True)]
    torch._dynamo.reset()

    def work(rank):
        rank_of.now = rank
        function = torch.compile(block(operation.number(attends[rank])), fullgraph=True, backend=backend)
        return function(tensors[0][:, joint.rows[0] * rank :][:, : joint.rows[rank]], *tensors[1:])

    # one after the other would wait for each other, and both at once compile under one lock
    results = on_ranks(2, work)
    with torch.inference_mode():
        expected = block(operation.number(whole := Attend()))(*tensors)
    assert whole.calls == 0
    assert torch.allclose(torch.cat(results, 1), expected, rtol=1e-5, atol=1e-5)
    assert events == [["start 0", "there", "wait 0", "attention", "start 1", "back", "wait 1"]] * 2
