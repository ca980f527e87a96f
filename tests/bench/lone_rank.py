"""One rank of several on one card: its own part of a step is computed, messages only take the time that a link would take.

A forecast for machines with several cards, from a machine with one: what a rank computes, copies and launches is real, and so
are streams and captures. What is not: peers that are late, and the share of the card that sending itself takes. Results mean
nothing, because what should come from peers is this rank's own.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import cases
import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from kernel_times import profiled
from record import Record, Row, memory
from rows import attempt
from sizes import CASES
from steps import sized

from para_core.comfy import sidecars
from para_core.comfy.attach import attach
from para_core.group.communicator import Communicator, Meshes
from para_core.group.transport import Life
from para_core.sequence.mesh import Comm, Degrees, Link, Mesh
from para_core.settings import Attention, Compile, Parallel

LINKS = {
    "messages take no time": Link(0.0, float("inf")),
    "messages as over NVLink": Link(3e-5, 2.2e11),
}
"""Assumed. NVLink: about half the 450 GB/s each way that are nominal between two H100s."""


def measure(record: Record, name: str, options: Namespace) -> None:
    """Rows of one case: one rank of one, then one of several with each link, in every mode of ``options.modes``."""
    case = sized(CASES[name], options)
    backend = options.backends.split(",")[0]
    ways: dict[str, tuple[str, int, Link]] = {}
    for mode in options.modes.split(","):
        ways[f"1 rank, {backend}, {mode}"] = mode, 1, Link(0.0, float("inf"))
        for count in options.ranks:
            ways |= {f"1 of {count} ranks, {backend}, {mode}, {words}": (mode, count, link) for words, link in LINKS.items()}
    missing = [way for way in ways if record.find("share", case=name, way=way, memory=memory()) is None]
    if not missing:
        return
    model = cases.build(case)
    for way in missing:
        mode, count, link = ways[way]
        with attempt(record, "share", {"case": name, "way": way, "memory": memory()}, options) as row:
            with stand_in(count, link):
                row.update(one(attach(attach(attach(model, Attention(backend)), Compile(mode)), Parallel(gpus=count)), case))
            whole = record.find("share", case=name, way=f"1 rank, {backend}, {mode}", memory=memory())
            if count > 1 and whole and "step_ms" in whole:
                row["efficiency"] = round(whole["step_ms"] / row["step_ms"] / count, 3)
    comfy.model_management.unload_all_models()


def one(model: ModelPatcher, case: Any) -> Row:
    run = cases.sample(model, case)
    row = {
        "step_ms": round(run.step * 1e3, 2),
        "spread_ms": round((max(run.seconds) - min(run.seconds)) * 1e3, 2),
        "launch_ms": round(run.launch * 1e3, 2),
        "ranks": run.report["ranks"],
        "replays": run.report["replays"],
        **profiled(model, case),
    }
    return row | ({"notes": run.report["notes"]} if run.report["notes"] else {})


@contextmanager
def stand_in(ranks: int, link: Link) -> Iterator[None]:
    """Runs inside believe that there are so many cards, which do what they are told."""
    kept: Any = sidecars._group, sidecars._devices
    device = comfy.model_management.get_torch_device()
    sidecars._group = Lone(device, ranks, link)
    sidecars._devices = lambda _settings, _own, _say: [str(device)] * (ranks - 1)
    try:
        yield
    finally:
        sidecars._group, sidecars._devices = kept


class Lone:
    """What a run asks of its group, of rank 0 of ``ranks`` without the others."""

    def __init__(self, device: torch.device, ranks: int, link: Link):
        self.members: list[Any] = []
        self._world = Imagined(0, range(ranks), device, None, 60.0, Life())
        self._world.link = link
        self._world.connect()
        self._meshes = Meshes(self._world)
        self._link = link
        self._under_way: list[torch.cuda.Event | None] = []

    def nothing(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    form = load = open = begin = end = drop = measure = close = nothing

    def fits(self, *_: Any) -> bool:
        return True

    def link(self) -> Link:
        return self._link

    def sayings(self) -> Iterator[tuple[str, str]]:
        return iter(())

    @contextmanager
    def step(self, order: Mapping[str, Any], ahead: Callable[[], bool]) -> Iterator[tuple[Mesh, Comm]]:
        mesh = self._meshes.mesh(Degrees(*order["degrees"]))
        assert mesh is not None
        yield mesh, self._world
        self._under_way.append(self._world.mark())
        self.land(int(ahead()))

    def land(self, leaving: int = 0) -> None:
        while len(self._under_way) > leaving:
            self._world.settle(reached=self._under_way.pop(0))

    under_way = 0


class Imagined(Communicator):
    """A communicator whose other ranks are imagined, and so are those of its subgroups."""

    link: Link

    def connect(self) -> None:
        if self.size > 1:
            self._transport = Delay(self.rank, self.device, self.link)

    def split(self, ranks: Sequence[int]) -> Communicator:
        key = tuple(ranks)
        if key not in self._subgroups:
            found = Imagined(key.index(self.rank), key, self.device, None, 60.0, self._life)
            found.link = self.link
            found.connect()
            self._subgroups[key] = found
        return self._subgroups[key]


class Delay:
    """A ``Transport`` that lets time pass on the stream: as ``Nccl``, beside the current one for what is started ahead."""

    def __init__(self, rank: int, device: torch.device, link: Link):
        self._rank, self._link = rank, link
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._aside = torch.cuda.Stream(device, priority=-1)
            if link.latency:
                self._wait(1)

    def start_all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, received_sizes: list[int], sent_sizes: list[int], *, ahead: bool = False
    ) -> Any:
        leaving = sum(sent_sizes) - sent_sizes[self._rank]

        def exchange() -> None:
            for other, (there, here) in enumerate(zip(received.split(received_sizes), sent.split(sent_sizes), strict=True)):
                if other != self._rank:  # numbers like those that would come: how much power a card needs depends on them
                    some = min(there.numel(), here.numel())
                    there[:some].copy_(here[:some])
            self._pass(leaving)

        if not ahead or not self._cuda:
            exchange()
            return None
        ready, done = torch.cuda.Event(), torch.cuda.Event()
        ready.record()
        self._aside.wait_event(ready)
        with torch.cuda.stream(self._aside):
            exchange()
        done.record(self._aside)
        return done, sent, received

    def start_all_reduce(self, tensor: torch.Tensor) -> None:
        self._pass(tensor.nbytes)

    def start_broadcast(self, tensor: torch.Tensor, root: int) -> None:
        self._pass(tensor.nbytes)

    def start_shift(self, sent: torch.Tensor, to: int, received: torch.Tensor, source: int) -> Any:
        return self.start_all_to_all(received, sent, [0, received.numel()], [0, sent.numel()], ahead=True)

    def finish(self, work: Any) -> None:
        if work is not None:
            torch.cuda.current_stream().wait_event(work[0])

    def check(self) -> None:
        pass

    abort = close = check

    def _pass(self, size: int) -> None:
        if self._cuda and size and self._link.latency:
            self._wait(int(1e9 * (self._link.latency + size / self._link.rate)))

    def _wait(self, nanoseconds: int) -> None:
        from waiting import wait  # triton, which only cards come with

        wait[(1,)](nanoseconds)
