"""Whether splitting a step pays: its arithmetic against what several ranks must exchange, from measured rates.

A forecast, not a measurement: it only has to tell clear losses from gains. Bytes of an exchange: Ulysses (arXiv 2309.14509)
sends four tensors of ``S x width`` a layer, each rank ``(N - 1) / N**2`` of each; a ring (arXiv 2310.01889) passes keys and
values to each of the others.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..plans.plan import Plan, check
from ..sequence.layout import weighted
from ..sequence.mesh import Degrees, Link, replica_speeds

EFFICIENCY = 0.6
"""Share of the matrix rate that a whole forward reaches (FLUX.1-dev 1024², H100, bf16: 74 TFLOP in 180 ms at 700 TFLOP/s)."""
WORTH = 1.05
"""Least forecast gain for which a run is split."""
EAGER, COMPILED = 1.2e-3, 7e-4
"""Seconds that the processor needs to launch a block, which more ranks do not shorten (FLUX.1-dev eager beside an H100: 70 ms for
57 blocks; compiled: an estimate). A CUDA graph needs none."""
SHARED = 2e-4
"""Seconds that it needs besides for each of a block's collectives, with what is packed and computed for it (an estimate)."""
FASTEST = Link(1e-5, 9e11)
"""No link is faster: that of NVLink 5, and the least that a collective takes."""
FASTER = 100
"""No card is so many times as fast as another."""
FETCHED = 1.2e10
"""Bytes a second of weights that are fetched from the host's memory (PCIe 4.0 x16: an estimate)."""
UNEQUAL = 0.9
"""Speed of a GPU over the fastest one's, below which shares are in proportion to speed."""
GRAIN = 20
"""Speeds are told in so many parts of the fastest one's: a measurement's noise changes no share."""
LAUNCH = 5e-6
"""Seconds of a small kernel, its launch included."""
QUANTISING, QUANTISING_COMPILED = (45.0, 26), (11.5, 200)
"""What quantising a byte of q, k and v there and back costs, in bytes that a plain copy moves meanwhile, and for each call, in
small kernels: more than sending it as it is. Measured on one H100 (FLUX 1024²: 0.5 ms plain, 1 ms compiled, most of it the
processor's; Wan 480p: 4.2 and 1.1 ms): far from what the bytes alone would take."""
PART_LAUNCHES = 10
"""Kernels that packing and unpacking another part takes."""
PART_COST = 0.02
"""Share of attention's time that is lost where it is computed in parts."""
PARTS = (2, 4)
HIDDEN = 0.2
"""Least share of the exchange that cutting heads in parts must hide."""


@dataclass(frozen=True)
class Work:
    """One sampling step: ``rows`` batch rows of ``tokens``, each through ``layers`` blocks and ``parameters`` in all."""

    rows: int
    tokens: int
    width: int
    layers: int
    parameters: int
    itemsize: int = 2

    @property
    def operations(self) -> float:
        """Floating-point operations a row: matrices, then attention."""
        return 2.0 * self.parameters * self.tokens + 4.0 * self.tokens**2 * self.width * self.layers


def work_of(plan: Plan, model: torch.nn.Module, rows: int, tokens: int) -> Work:
    """The work of one step of ``model``, as far as its blocks tell: each of a block's streams has its share of the weights."""
    stacks = [(spec, blocks) for spec, blocks in check(plan, model) if not spec.side]
    widths = [part.in_features for part in stacks[0][1][0].modules() if isinstance(part, torch.nn.Linear)]
    parameters = sum(
        parameter.numel() // len(spec.tokens) for spec, blocks in stacks for block in blocks for parameter in block.parameters()
    )
    return Work(rows, tokens, statistics.mode(widths), sum(len(blocks) for _, blocks in stacks), parameters)


def seconds(work: Work, degrees: Degrees, rate: float, link: Link | None = None, launching: float = 0.0) -> float:
    """Forecast of a step on ``degrees``; ``rate``: operations a second of one rank's matrices; ``launching``: seconds a block."""
    rows, ranks = -(-work.rows // degrees.batch), degrees.sequence
    compute = rows * work.operations / (EFFICIENCY * rate) / ranks
    if ranks == 1 or link is None:
        return max(compute, work.layers * launching)
    tensor = rows * work.tokens * work.width * work.itemsize
    ulysses, ring = degrees.ulysses, degrees.ring
    sent = 4 * tensor / ring * (ulysses - 1) / ulysses**2 + 2 * tensor / ranks * (ring - 1)
    collectives = 2 * (ulysses > 1) + (ring - 1)
    on_device = compute + work.layers * (sent / link.rate + collectives * link.latency)
    launched = launching + collectives * SHARED if launching else 0.0
    return max(on_device, work.layers * launched)


def gain(work: Work, degrees: Degrees, rate: float, link: Link, shared: float | None = None, *, launching: float = 0.0) -> float:
    """How many times faster a step on ``degrees`` should be than on one rank. ``shared``: see ``reached``, where ranks differ."""
    return seconds(work, Degrees(), rate, launching=launching) / seconds(work, degrees, shared or rate, link, launching)


@lru_cache(maxsize=64)
def speeds(rates: tuple[float, ...], degrees: Degrees, heads: int) -> tuple[float, ...] | None:
    """For the meshes of ``degrees``: speeds of all its ranks as parts of the fastest rank's; None where they are about equal.

    rates: see ``matrix_rate``. Replicas whose attention would be done later than with even shares get such: ``heads`` are cut
    whole, and under a ring in one way for all, which may suit no rank.
    """
    ranks = degrees.sequence
    rounded = tuple(max(1, round(GRAIN * rate / max(rates))) / GRAIN for rate in rates)[: degrees.world]
    if min(rounded) >= UNEQUAL * max(rounded):
        return None
    found: tuple[float, ...] = ()
    for replica in range(degrees.batch):
        by_speed, even = rounded[replica * ranks :][:ranks], (1.0,) * ranks
        late, usual = (last(weights, by_speed, degrees.ulysses, heads)[1] for weights in (by_speed, even))
        found += by_speed if late <= usual * (1 + 1e-9) else even
    return found


def reached(work: Work, degrees: Degrees, rates: tuple[float, ...], heads: int) -> float:
    """Operations a second of each rank if all were alike and as soon done as ranks of ``rates`` with shares by ``speeds``.

    A replica waits for its last rank in what goes by rows, and again in attention; the batch is shared evenly.
    """
    ranks, attention = degrees.sequence, 4.0 * work.tokens**2 * work.width * work.layers / work.operations
    longest = 0.0
    for replica in range(degrees.batch):
        weights = replica_speeds(speeds(rates, degrees, heads), degrees, replica) or (1.0,) * ranks
        by_rows, by_heads = last(weights, rates[replica * ranks :][:ranks], degrees.ulysses, heads)
        longest = max(longest, (1 - attention) * by_rows + attention * by_heads)
    return 1 / (ranks * longest)


def last(weights: Sequence[float], rates: Sequence[float], ulysses: int, heads: int) -> tuple[float, float]:
    """When a replica's last rank has done what goes by rows, and when attention, each of one operation shared by ``weights``."""
    rows = [weight / sum(weights) for weight in weights]
    cut = weighted(heads, [sum(rows[place::ulysses]) for place in range(ulysses)])
    attended = [sum(rows[rank - rank % ulysses :][:ulysses]) * cut[rank % ulysses] / heads for rank in range(len(rows))]
    by_rows, by_heads = (max(share / rate for share, rate in zip(shares, rates, strict=True)) for shares in (rows, attended))
    return by_rows, by_heads


def unlike(devices: Sequence[torch.device]) -> bool:
    """Whether these CUDA devices are cards of several kinds, which may be of unequal speed."""
    return devices[0].type == "cuda" and len({torch.cuda.get_device_name(device) for device in devices}) > 1


def message(size: float, link: Link) -> float:
    """Seconds of a collective in which a rank sends ``size`` bytes."""
    return max(link.latency, size / link.rate) if size else 0.0


def exposed(size: float, link: Link, hidden: float) -> float:
    """Seconds that a rank waits for such a collective while it has ``hidden`` seconds of other work."""
    return max(0.0, message(size, link) - hidden)


def saved_by_bytes(
    elements: float, itemsize: int, dim: int, link: Link, memory: float, *, compiled: bool = False, hidden: float = 0.0
) -> float:
    """Seconds that a call gains where ``elements`` of q, k and v travel in one byte each, and a float for each ``dim``.

    ``memory``: bytes a second that a rank's memory copies (read and written counted). ``hidden``: see ``exposed``.
    """
    saved = exposed(elements * itemsize, link, hidden) - exposed(elements * (1 + 4 / dim), link, hidden)
    moved, launches = QUANTISING_COMPILED if compiled else QUANTISING
    return saved - moved * elements * itemsize / memory - launches * LAUNCH


def parts(there: float, back: float, attention: float, link: Link, most: int) -> int:
    """In how many parts heads should travel, so that all but the first and last message are hidden behind attention.

    ``there``, ``back``: seconds of the messages before and after ``attention``'s, as far as nothing else hides them. ``most``: parts
    there can be.
    """

    def waited(count: int) -> float:
        before, after = (max(whole / count, min(whole, link.latency)) for whole in (there, back))
        late = max(0.0, (count - 1) * (before + after - attention / count))
        return before + after + late + PART_COST * attention + (count - 1) * PART_LAUNCHES * LAUNCH

    found = min((count for count in PARTS if count <= most), key=waited, default=1)
    return found if found > 1 and waited(found) <= (1 - HIDDEN) * (there + back) else 1


@lru_cache(maxsize=8)
def memory_rate(device: torch.device, size: int = 1 << 26) -> float:
    """Bytes a second, read and written, of a copy of ``size`` bytes on a CUDA ``device``, measured once."""
    one, other = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2.0 * size / least_seconds(lambda: other.copy_(one), device)


@lru_cache(maxsize=8)
def matrix_rate(device: torch.device, dtype: torch.dtype, side: int = 4096) -> float:
    """Operations a second of a square matrix product of ``side`` on a CUDA ``device``, measured once."""
    one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2.0 * side**3 / least_seconds(lambda: torch.mm(one, other), device, repeats=100)  # a GPU at rest needs a while to speed up


def least_seconds(call: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The least of ``repeats`` times of ``call`` on the stream of a CUDA ``device``, after one that warms it up."""
    times = []
    for index in range(repeats + 1):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        with torch.cuda.device(device):
            marks[0].record()
            call()
            marks[1].record()
            marks[1].synchronize()
        if index:
            times.append(marks[0].elapsed_time(marks[1]) / 1e3)
    return min(times)
