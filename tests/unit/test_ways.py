"""How exchanged calls travel: as bytes only where the kernel quantises, the link is slow and the numbers bear it."""

from __future__ import annotations

import pytest
import torch
from unit.fake_comm import fake_meshes, on_ranks
from unit.shared_attention import reference, rows_of, tensors

from para_core.attention.backends import Backend, pytorch
from para_core.attention.call import Call
from para_core.attention.choice import Chooser
from para_core.attention.exchange import PLAIN, Exchange, Way, attend_call
from para_core.attention.timings import kind as timed_kind
from para_core.execution import gain
from para_core.execution.ways import Machine, Ways
from para_core.sequence.layout import Joint, balanced
from para_core.sequence.mesh import Link

QUANTISING = Backend("quantising", False, "", lambda: None, lambda request: None, pytorch.run, pytorch.run_lse)
SLOW, FAST = Machine(Link(1e-5, 1e6), 1e12), Machine(Link(1e-5, 2e11), 1e12)


class Ranks:
    """Ranks that are threads; ``step`` computes one attention call on all as rank 0 has decided."""

    def __init__(self, ring=1, ulysses=2, *, setting="auto", machine=SLOW, heads=6, kv_heads=6, size=1.0):
        self.meshes = fake_meshes(ring, ulysses)
        ranks = range(len(self.meshes))
        self.joint = Joint((balanced(33, len(ranks)), balanced(7, len(ranks))))
        self.tensors = [tensor * size for tensor in tensors(self.joint, self.joint, heads, kv_heads, 2, 0)]
        table = (QUANTISING, pytorch.BACKEND)
        self.choosers = [
            Chooser(setting, table=table, order=lambda request: ("quantising", "pytorch"), say=lambda _: None) for _ in ranks
        ]
        self.ways = [Ways(chooser, machine if rank == 0 else None) for rank, chooser in enumerate(self.choosers)]
        self.exchanges = [Exchange(mesh, self.joint, self.joint) for mesh in self.meshes]
        self.low_precision = True
        self.where, self.beside = "", None

    def step(self):
        """The ways that were told, and the bytes that each rank has sent; the result must be attention."""
        told = self.ways[0].decide()
        for ways in self.ways[1:]:
            ways.learn(told)
        sent = [exchange.traffic.bytes for exchange in self.exchanges]
        mesh = self.meshes[0]
        outs = on_ranks(len(self.meshes), self.call, [mesh.sequence, mesh.ulysses, mesh.ring])
        whole = torch.empty_like(self.tensors[0])
        for rank, out in enumerate(outs):
            whole[:, :, rows_of(self.joint, rank)] = out
        exact = reference(*self.tensors)
        assert (whole.double() - exact).norm() < (0.02 if told else 1e-5) * exact.norm()
        return told, [exchange.traffic.bytes - before for exchange, before in zip(self.exchanges, sent, strict=True)]

    def call(self, rank):
        q, k, v = (tensor[:, :, rows_of(self.joint, rank)] for tensor in self.tensors)
        options = {"skip_reshape": True, "skip_output_reshape": True, "low_precision_attention": self.low_precision}
        call = Call.parse(pytorch.run, (q, k, v, q.shape[1]), options)
        exchange, ways = self.exchanges[rank], self.ways[rank]
        return attend_call(exchange, call, self.choosers[rank].kernel(call), ways.way(exchange, call, self.where, self.beside))


@pytest.mark.parametrize("degrees", [(1, 2), (1, 4), (2, 1), (2, 2)])
def test_on_a_slow_link_what_a_quantising_kernel_gets_travels_as_bytes_from_the_second_forward(degrees):
    ranks = Ranks(*degrees)
    told, plain = ranks.step()
    assert told == {}
    told, sent = ranks.step()
    assert list(told.values()) == [[True, 1]]
    assert all(0 < after < 0.8 * before for after, before in zip(sent, plain, strict=True))
    assert ranks.ways[0].report() == {"wire": "int8", "parts": 1}


OTHERS = [{"setting": "exact"}, {"setting": "pytorch"}, {"setting": None}, {"machine": FAST}, {"machine": None}, {"size": 40.0}]


@pytest.mark.parametrize("changes", OTHERS, ids=str)
def test_nothing_travels_as_bytes_otherwise(changes):
    """Exact kernels, ComfyUI's own attention, a fast link, a link that nobody measured, numbers that do not bear it."""
    ranks = Ranks(**changes)
    if changes.get("setting") is None and "setting" in changes:
        ranks.choosers[0].previous = None
        ranks.call = lambda rank, call=ranks.call: call(rank) if ranks.choosers[rank].setting else stock(ranks, rank)
    assert [ranks.step()[0] for _ in range(3)] == [{}] * 3
    assert ranks.ways[0].report()["wire"] is None


def stock(ranks, rank):
    """The stock function answers calls like ComfyUI's: heads by position, layout by flags."""
    exchange, ways = ranks.exchanges[rank], ranks.ways[rank]
    q, k, v = (tensor[:, :, rows_of(ranks.joint, rank)] for tensor in ranks.tensors)
    call = Call.parse(lambda q, k, v, heads, **_: pytorch.run(q, k, v, mask=None, scale=None), (q, k, v, 6), {"skip_reshape": True})
    call.skip_output_reshape = True
    return attend_call(exchange, call, ranks.choosers[rank].kernel(call), ways.way(exchange, call))


def test_a_call_whose_model_forbids_quantising_travels_as_it_is():
    ranks = Ranks()
    ranks.low_precision = False
    assert [ranks.step()[0] for _ in range(2)] == [{}, {}]


def test_once_the_quantising_kernel_is_out_calls_travel_as_they_are_again():
    ranks = Ranks()
    ranks.step()
    assert ranks.step()[0]
    before = ranks.ways[0].identity()
    for chooser in ranks.choosers:
        chooser.replace("quantising", "it gave NaN")
    assert ranks.step()[0] == {} and ranks.ways[0].identity() != before, "a captured forward belongs to its ways"


def test_ranks_of_uneven_rows_heads_and_groups_know_a_call_by_one_name():
    for changes in ({"ulysses": 4, "heads": 7, "kv_heads": 7}, {"ulysses": 3, "heads": 6, "kv_heads": 2}, {"ring": 2, "ulysses": 2}):
        ranks = Ranks(**changes)
        ranks.step()
        told, _ = ranks.step()
        assert list(told.values()) == [[True, 1]] and all(way.table == ranks.ways[0].table for way in ranks.ways)
        assert all(way.used == {PLAIN, Way(True)} for way in ranks.ways)


class Mlp:
    """What stands beside a call: so many operations while its messages travel there, and back."""

    def __init__(self, there: float, back: float):
        self.operations = there, back


@pytest.mark.parametrize(("beside", "told"), [((0.0, 0.0), [[True, 2]]), ((1.0, 0.0), []), ((0.0, 1.0), [[True, 1]])])
def test_heads_are_cut_where_attention_is_long_enough_to_hide_messages_that_nothing_else_hides(beside, told):
    ranks = Ranks(machine=Machine(Link(1e-5, 1e7), 1e12, 1.0))
    ranks.beside = Mlp(*beside)
    ranks.step()
    met = next(iter(ranks.ways[0]._met.values()))
    assert met.q.shape == (2, 3, 40, 8) and met.parts == 3
    request = ranks.choosers[0].decide(met.q, met.k, None, None, needs_lse=False, low_precision_ok=True).request
    ranks.choosers[0].learn({timed_kind(request): {"quantising": 5.0}})
    assert list(ranks.step()[0].values()) == told


ONE_A_SECOND = Machine(SLOW.link, SLOW.memory, 1.0)


@pytest.mark.parametrize(("seconds", "bytes_pay"), [(0.0, True), (1e-9, True), (1.0, False)])
def test_what_an_mlp_hides_travels_as_it_is(seconds, bytes_pay):
    """Only in the blocks that have one: calls of others are known by another name."""
    ranks = Ranks(machine=ONE_A_SECOND)
    ranks.step()
    ranks.where, ranks.beside = "single_blocks", Mlp(seconds, seconds)
    ranks.step()
    told, _ = ranks.step()
    (plain, elsewhere), *_ = told.items()
    assert elsewhere == [True, 1] and "single_blocks" not in plain
    assert [way for name, way in told.items() if name == f"{plain}, single_blocks"] == ([[True, 1]] if bytes_pay else [])


def test_in_a_ring_an_mlp_hides_nothing():
    ranks = Ranks(2, 1, machine=ONE_A_SECOND)
    ranks.beside = Mlp(1.0, 1.0)
    ranks.step()
    assert list(ranks.step()[0].values()) == [[True, 1]]


def test_a_machine_that_was_not_measured_hides_nothing():
    ranks = Ranks()
    ranks.beside = Mlp(1e30, 1e30)
    ranks.step()
    assert list(ranks.step()[0].values()) == [[True, 1]]


def test_messages_are_waited_for_as_far_as_other_work_does_not_hide_them():
    link = Link(1e-5, 1e9)
    assert gain.exposed(1e6, link, 0.0) == gain.message(1e6, link) == pytest.approx(1e-3)
    assert gain.exposed(1e6, link, 4e-4) == pytest.approx(6e-4)
    assert gain.exposed(1e6, link, 1.0) == 0.0
    saved = [gain.saved_by_bytes(1e7, 2, 128, link, 1e12, compiled=True, hidden=hidden) for hidden in (0.0, 15e-3, 50e-3)]
    assert saved[0] > saved[1] > 0 > saved[2], "nothing is saved where nothing was waited for, and quantising costs"


NVLINK, PCIE, PCIE_3 = Link(5.5e-5, 2e11), Link(3e-5, 2.4e10), Link(3e-5, 1.2e10)
H100 = 2.5e12  # bytes a second, read and written
FLUX, WAN = (rows * width * 3 / 4 for rows, width in ((4608, 3072), (32760, 5120)))  # elements that leave one rank of two


@pytest.mark.parametrize(
    ("elements", "link", "pays"), [(FLUX, NVLINK, False), (WAN, NVLINK, False), (FLUX, PCIE_3, True), (WAN, PCIE, True)]
)
def test_bytes_pay_where_the_link_is_slow_for_the_memory(elements, link, pays):
    assert (gain.saved_by_bytes(elements, 2, 128, link, H100) > 0) is pays
    assert (gain.saved_by_bytes(WAN, 2, 128, link, H100, compiled=True) > 0) is (link != NVLINK)
    assert gain.saved_by_bytes(1000, 2, 128, link, H100) < 0, "a small call waits for the launches"


@pytest.mark.parametrize(
    ("elements", "attention", "link", "count"),
    [(FLUX, 0.27e-3, NVLINK, 1), (WAN, 14e-3, NVLINK, 4), (WAN, 14e-3, PCIE, 4), (FLUX, 0.27e-3, PCIE, 1), (FLUX, 2e-3, PCIE, 4)],
)
def test_parts_pay_where_attention_is_long_for_the_exchange(elements, attention, link, count):
    times = gain.message(2 * elements, link), gain.message(2 * elements / 3, link)
    assert gain.parts(*times, attention, link, 12) == count
    assert gain.parts(*times, attention, link, 1) == 1
