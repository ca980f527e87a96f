"""Calls of attention on ranks that are threads, of every layout, and what they should give."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from unit.fake_comm import Recorder, fake_meshes, on_ranks

from para_core.attention.backends import pytorch
from para_core.attention.exchange import PLAIN, Exchange, attend
from para_core.sequence.layout import Joint, balanced
from para_core.sequence.mesh import Mesh

D = 8


@dataclass
class ExactKernel:
    """The reference kernel. It must never see an empty tensor: kernels crash on them."""

    has_lse: bool = True
    seen: list = field(default_factory=list)

    def run(self, q, k, v, *, mask, scale):
        self.look(q, k, v)
        return pytorch.run(q, k, v, mask=mask, scale=scale)

    def run_lse(self, q, k, v, *, mask, scale):
        self.look(q, k, v)
        return pytorch.run_lse(q, k, v, mask=mask, scale=scale)

    def look(self, q, k, v):
        assert q.numel() and k.numel() and v.numel(), "the kernel was given nothing to do"
        assert q.shape[1] % k.shape[1] == 0 and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        self.seen.append((q, k, v))


def rows_of(joint: Joint, rank: int) -> torch.Tensor:
    """Natural positions of the rows that ``rank`` holds."""
    start = sum(joint.rows[:rank])
    return joint.rank_major[start : start + joint.rows[rank]]


def flat_view(t: torch.Tensor) -> torch.Tensor:
    """The same values as a view of a (B, S, H * D) tensor, as linear layers make them."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def shared(meshes, q_joint, kv_joint, q, k, v, mask=None, scale=None, *, local_mask=None, kernel=ExactKernel, traffic=None, way=PLAIN):
    """Run the call on all ranks; return the outputs put together in natural order.

    ``mask``: the same for all, unless ``local_mask(rank)`` gives each its own.
    """

    def work(rank):
        exchange = Exchange(meshes[rank], q_joint, kv_joint, kernel(), **({} if traffic is None else {"traffic": traffic[rank]}))
        local = [flat_view(t[:, :, rows_of(joint, rank)]) for t, joint in ((q, q_joint), (k, kv_joint), (v, kv_joint))]
        out = attend(exchange, *local, local_mask(rank) if local_mask else mask, scale, way=way)
        assert out.shape == local[0].shape and out.dtype == q.dtype
        return out

    outs = on_ranks(len(meshes), work, [mesh.sequence for mesh in meshes])
    whole = torch.full_like(q, float("nan"))
    for rank, out in enumerate(outs):
        whole[:, :, rows_of(q_joint, rank)] = out
    return whole


def recorded(ring, ulysses, q_joint, kv_joint, heads=6, *, way=PLAIN, beside=lambda rank, events: None):
    """What each rank sends and computes in one call, in order, and the tensors its kernel saw. The result must be attention.

    ``beside(rank, events)``: what stands beside the call on that rank.
    """
    q, k, v = tensors(q_joint, kv_joint, heads, heads, 1, 0)
    meshes = fake_meshes(ring, ulysses)
    events, kernels = [[] for _ in meshes], [ExactKernel() for _ in meshes]

    def work(rank):
        mesh, noted, kernel = meshes[rank], events[rank], kernels[rank]
        look = kernel.look
        kernel.look = lambda *args: (noted.append("compute"), look(*args))
        mesh = Mesh(mesh.sequence, Recorder(mesh.ulysses, noted), Recorder(mesh.ring, noted))
        local = [t[:, :, rows_of(joint, rank)] for t, joint in ((q, q_joint), (k, kv_joint), (v, kv_joint))]
        return attend(Exchange(mesh, q_joint, kv_joint, kernel), *local, way=way, beside=beside(rank, noted))

    for rank, out in enumerate(on_ranks(len(meshes), work)):
        assert_same(out, reference(q, k, v)[:, :, rows_of(q_joint, rank)])
    return events, [kernel.seen for kernel in kernels]


def reference(q, k, v, mask=None, scale=None):
    """Attention in float64 on one rank."""
    k, v = (t.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    if mask is not None:
        mask = mask[:, None] if mask.ndim == 3 else mask
        mask = mask if mask.dtype == torch.bool else mask.double()
    return F.scaled_dot_product_attention(q.double(), k, v, attn_mask=mask, scale=scale)


def assert_same(out, expected):
    assert torch.isfinite(out).all()
    error = (out.double() - expected).norm() / expected.norm().clamp_min(1e-12)
    assert error < 1e-5, f"relative error {error:.2g}"


ranks_of = st.sampled_from([(1, 2), (1, 3), (1, 4), (1, 5), (2, 1), (3, 1), (5, 1), (2, 2), (2, 3), (3, 2)])


@st.composite
def shards(draw, ranks, most=9):
    """Rows of one segment on each rank, some perhaps none."""
    if draw(st.booleans()):
        return balanced(draw(st.integers(1, most)), ranks)
    return tuple(draw(st.lists(st.integers(0, 3), min_size=ranks, max_size=ranks).filter(any)))


@st.composite
def joints(draw, ranks):
    """A query and a key layout: the same one, one that shares a segment, or unrelated ones."""
    q = [draw(shards(ranks)) for _ in range(draw(st.integers(1, 3)))]
    kind = draw(st.sampled_from(["same", "same", "shared", "other"]))
    if kind == "same":
        return Joint(tuple(q)), Joint(tuple(q))
    return Joint(tuple(q)), Joint((draw(shards(ranks)), *(q[-1:] if kind == "shared" else ())))


@st.composite
def cases(draw):
    ring, ulysses = draw(ranks_of)
    q_joint, kv_joint = draw(joints(ring * ulysses))
    kv_heads = draw(st.sampled_from([1, 2, 3, 4, 5, 12]))
    heads = kv_heads * (draw(st.sampled_from([1, 1, 2, 3])) if kv_heads < 12 else 1)
    return ring, ulysses, q_joint, kv_joint, heads, kv_heads, draw(st.integers(1, 3)), draw(st.integers(0, 2**16))


def tensors(q_joint, kv_joint, heads, kv_heads, batch, seed):
    torch.manual_seed(seed)
    shape = (batch, kv_heads, kv_joint.total, D)
    return torch.randn(batch, heads, q_joint.total, D), torch.randn(shape), torch.randn(shape)
