"""How exchanged attention calls travel: rank 0 chooses between two forwards, for all ranks, by the measured link.

A call travels as bytes (``attention.wire``) where the kernel that is chosen for it quantises anyway, where the time that the
link saves exceeds that of quantising, and where a look at the run's own numbers has shown that attention hardly changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from ..attention import wire
from ..attention.backends import Backend, pytorch
from ..attention.beside import Beside
from ..attention.call import Call
from ..attention.choice import Chooser
from ..attention.exchange import PLAIN, Exchange, Way
from ..attention.selfcheck import ROWS, relative_error
from ..attention.ulysses import split_heads
from ..sequence.mesh import Link
from . import gain

BOUND = 0.05
"""Largest relative L2 change of attention by what travels as bytes (unit-normal data: 1e-2; SageAttention 2.2 itself 3.9e-2)."""


@dataclass(frozen=True)
class Machine:
    """What a forecast needs: the link between ranks, and bytes a second that one rank's memory copies.

    ``matrices``: operations a second of its matrix products; infinite where no one asked, for then nothing is known to hide messages.
    """

    link: Link
    memory: float
    matrices: float = math.inf


@dataclass(frozen=True)
class Met:
    """A kind of exchanged call as rank 0 met it. q, k and mask stand for what the kernel gets, without memory."""

    q: torch.Tensor
    k: torch.Tensor
    mask: torch.Tensor | None
    scale: float | None
    low_precision: bool
    needs_lse: bool
    sent: float
    """Elements of q, k and v that leave the rank."""
    returned: float
    """Elements of outputs that do."""
    parts: int
    """The most parts that heads can be cut in."""
    beside: tuple[float, float] = (0.0, 0.0)
    """Operations that are computed while its messages travel there and back."""


@dataclass
class Ways:
    """``machine``: rank 0's, for a run whose exchange may be improved; None on the others, which are told ``table``."""

    chooser: Chooser
    machine: Machine | None = None
    compiled: bool = False
    """Whether quantising is one kernel."""
    table: dict[str, Way] = field(default_factory=dict)
    used: set[Way] = field(default_factory=set)
    _met: dict[str, Met] = field(default_factory=dict)
    _errors: dict[str, torch.Tensor] = field(default_factory=dict)
    _known: dict[str, float] = field(default_factory=dict)

    def way(self, exchange: Exchange, call: Call, where: str = "", beside: Beside | None = None) -> Way:
        """How ``call`` travels.

        ``where``: the list of blocks that makes it, in some of which messages travel beside an MLP. Ranks agree on that, but not
        on ``beside``, which is missing where blocks could not be compiled.
        """
        name = kind(exchange, call, where)
        if self.machine is not None and name not in self._known:
            self._look(name, exchange, call, beside)
        way = self.table.get(name, PLAIN)
        self.used.add(way)
        return way

    def decide(self) -> dict[str, list[Any]]:
        """Choose for the next forward, and return the choice as data for the other ranks. May wait for the device, once a kind."""
        for name in [name for name in self._met if name not in self._known]:
            self._known[name] = float(self._errors.pop(name, torch.tensor(float("nan"))))
        if self.machine is not None:
            found = {name: self._choose(name, met, self.machine) for name, met in self._met.items()}
            self.table = {name: way for name, way in found.items() if way != PLAIN}
        return {name: [way.wire, way.parts] for name, way in self.table.items()}

    def learn(self, table: dict[str, list[Any]]) -> None:
        """Go the ways that rank 0 has chosen."""
        self.table = {name: Way(*way) for name, way in table.items()}

    def identity(self) -> tuple[tuple[str, Way], ...]:
        """What a captured forward depends on."""
        return tuple(sorted(self.table.items(), key=lambda item: item[0]))

    def report(self) -> dict[str, Any]:
        """``wire``: "int8" where some calls travelled quantised, else None. ``parts``: the most that heads travelled in."""
        return {"wire": "int8" if any(way.wire for way in self.used) else None, "parts": max((way.parts for way in self.used), default=1)}

    def _choose(self, name: str, met: Met, machine: Machine) -> Way:
        backend, attention = self._kernel(met)
        link, size, dim = machine.link, met.q.element_size(), met.q.shape[3]
        quantises = backend is not None and not backend.exact and self._known[name] <= BOUND
        there, back = (operations / machine.matrices for operations in met.beside)
        saved = gain.saved_by_bytes(met.sent, size, dim, link, machine.memory, compiled=self.compiled, hidden=there)
        as_bytes = quantises and saved > 0
        times = gain.exposed(met.sent * (1 + 4 / dim if as_bytes else size), link, there), gain.exposed(met.returned * size, link, back)
        count = 1 if attention is None else gain.parts(*times, attention, link, met.parts)
        if as_bytes and count > 1:  # fewer heads at once may be another kernel's
            backend, _ = self._kernel(met, count)
            as_bytes = backend is not None and not backend.exact
        return Way(as_bytes, count)

    def _kernel(self, met: Met, parts: int = 1) -> tuple[Backend | None, float | None]:
        heads, kv_heads = (-(-tensor.shape[1] // parts) for tensor in (met.q, met.k))
        return self.chooser.forecast(
            met.q[:, :heads], met.k[:, :kv_heads], met.mask, met.scale, needs_lse=met.needs_lse, low_precision_ok=met.low_precision
        )

    @torch.no_grad()
    def _look(self, name: str, exchange: Exchange, call: Call, beside: Beside | None) -> None:
        """Note a kind of call, and what its numbers would lose as bytes: in every layer of the first forward that has it."""
        q, k, v = call.q, call.k, call.v
        if not q.numel() or not k.numel() or q.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        if name not in self._met:
            self._met[name] = meet(exchange, call, beside)
        some = q[:, :, :: max(1, q.shape[2] // ROWS)]
        exact = pytorch.run(some, k, v, mask=None, scale=call.scale)
        travelled = pytorch.run(wire.round_trip(some), wire.round_trip(k, keys=True), wire.round_trip(v), mask=None, scale=call.scale)
        error = relative_error(travelled.float(), exact.float())
        known = self._errors.get(name)
        self._errors[name] = error if known is None else torch.maximum(known, error)


def kind(exchange: Exchange, call: Call, where: str = "") -> str:
    """A kind of call by what all ranks of its mesh know of it."""
    mesh, (batch, heads, _, dim) = exchange.mesh, call.q.shape
    words = [
        f"{mesh.ulysses.size} x {mesh.ring.size} ranks",
        f"{batch} x {exchange.q.total} x {exchange.kv.total} rows",
        f"{heads} over {call.kv_heads} heads of {dim}",
        str(call.q.dtype).removeprefix("torch."),
    ]
    if call.mask is not None:
        words.append(f"{call.mask.dtype} mask")
    return ", ".join([*words, *([] if call.low_precision else ["exact"]), *([where] if where else [])])


def meet(exchange: Exchange, call: Call, beside: Beside | None = None) -> Met:
    """What this rank's kernel gets, and what leaves the rank, in such a call."""
    mesh, (batch, heads, rows, dim) = exchange.mesh, call.q.shape
    ulysses, ring, rank = mesh.ulysses.size, mesh.ring.size, mesh.ulysses.rank
    kv_heads = call.kv_heads if call.kv_heads % ulysses == 0 or call.kv_heads == heads else heads
    shares = split_heads(heads, kv_heads, ulysses, mesh.head_speeds)
    group = slice(mesh.ring.rank * ulysses, (mesh.ring.rank + 1) * ulysses)
    q = call.q.new_empty(()).expand(batch, shares.q[rank], sum(exchange.q.rows[group]), dim)
    k = call.k.new_empty(()).expand(batch, shares.kv[rank], sum(exchange.kv.rows[group]), dim)
    own, own_kv = batch * heads * rows * dim, 2 * batch * kv_heads * call.k.shape[2] * dim
    abroad = (ulysses - 1) / ulysses
    return Met(
        q,
        k,
        None if call.mask is None else call.mask.new_empty(()),
        call.scale,
        call.low_precision,
        ring > 1,
        abroad * (own + own_kv) + (ring - 1) * own_kv,
        abroad * own,
        min(shares.kv) if ring == 1 else 1,
        beside.operations if beside is not None and ulysses > 1 else (0.0, 0.0),
    )
