"""Rank 0's side of the sidecar group: members, communicators, models, and the steps they share.

Processes outlive communicators: after a failure the communicator is dropped, the processes that are still well keep
their weights, and the next run joins them to a new one.
A run lasts from ``form`` to ``end``. The first loss in it is kept in ``lost``, and makes all ranks stop waiting.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..log import log
from ..sequence.mesh import Comm, Degrees, Link, Mesh
from ..stopwatch import Exchanged
from .codec import dtype_name, encode, filled, laid_out
from .communicator import CommunicationFailed, Communicator, Meshes
from .flights import Flights
from .link import PATIENCE, measure
from .member import Member, RankLost, one_line
from .models import Models
from .patience import Patience, Timeouts
from .pool import Pool
from .transport import REMEDY
from .watch import Watch, next_of

_COMPILING = 10  # times ``Timeouts.stuck`` in runs whose blocks are compiled, which may happen again at any step
_EXPLAINED = 2.0  # seconds in which the cause of a failed collective reaches the watch thread, if a peer is the cause


class GroupError(RuntimeError):
    """The group could not be formed: a clause that says why."""


class Group(Models):
    """For one thread at a time (ComfyUI's prompt thread), but for ``drop``; a thread of its own listens to the members.

    script: the file workers run. hello: plain data a new worker is told first, by rank, device and group size.
    ``counts`` says what was done: starts, joins, models and patches sent, steps.
    """

    def __init__(self, script: Path, hello: Callable[[int, str, int], dict[str, Any]]):
        self.timeouts = Timeouts()
        self.counts: Counter[str] = Counter()
        self.lost: str | None = None
        self._sayings: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self._told: str | None = None  # what the first member said that lost touch with others
        self._device = torch.device("cpu")
        # NVLink multicast is for large sums, and takes memory and time. One rank without is enough: ComfyUI's process is left as it is.
        self._pool = Pool(script, {"NCCL_NVLS_ENABLE": "0"})
        self._hello = hello
        self._members: list[Member] = []
        self._comm: Communicator | None = None
        self._meshes: Meshes | None = None
        self._link: Link | None = None
        self._silent: dict[tuple[str, ...], str] = {}  # workers' devices whose messages did not arrive, and what was said of it
        self._epochs = itertools.count(1)
        self._epoch = 0
        self._wanted = 1  # ranks, this one included, also while some of them start
        self._running = False
        self._patience = Patience()
        self._flights = Flights()
        self._mute = False  # whether the last loss was of ranks that all waited for each other
        self._last_use = time.monotonic()
        self._unwanted: queue.SimpleQueue[int] = queue.SimpleQueue()
        # Held while members or their models change. The watch thread only ever tries to get it.
        self._lock = threading.RLock()
        self._watch = Watch(self)

    @property
    def size(self) -> int:
        """Ranks, this one included."""
        return 1 + len(self._members)

    @property
    def members(self) -> list[Member]:
        return self._members

    @property
    def pids(self) -> list[int]:
        return [member.process.pid for member in self._members]

    # -- forming ------------------------------------------------------------------------------------------------------

    def warm(self, devices: Sequence[str]) -> None:
        """Start workers for ranks 1.. on ``devices`` where there are none, without waiting for them."""
        with self._lock:
            self._last_use = time.monotonic()
            places = list(enumerate(devices, start=1))
            found = {(member.rank, member.device): member for member in self._members if member.process.alive()}
            if list(found) == places and len(self._members) == len(places):
                return
            self._leave()
            kept = [found.get(place) for place in places]
            former, self._members = self._members, [member for member in kept if member is not None]
            for member in former:
                if member not in kept:
                    member.end()
                    self._pool.end(member.process)
            self._wanted = 1 + len(devices)
            for rank, known in enumerate(kept, start=1):
                if known is None:  # one by one: those that have started are known if the next does not start
                    self._members.insert(rank - 1, self._start(rank, devices[rank - 1]))
            self._watch.wake()

    def expect(self, devices: Sequence[str]) -> None:
        """``warm`` ahead of a run: what stands against it is said by the run's ``form``, should it be so still."""
        try:
            if tuple(devices) not in self._silent:
                self.warm(devices)
        except (RuntimeError, OSError) as error:
            log.warning("workers did not start: %s", one_line(error))

    def _start(self, rank: int, device: str) -> Member:
        self.counts["starts"] += 1
        hello = self._hello(rank, device, self._wanted)
        member = Member(rank, device, self._pool.start())
        member.greet(hello, self.timeouts.start, self._watch.wake)
        return member

    def form(self, device: torch.device, devices: Sequence[str]) -> None:
        """A run starts: have a worker on each of ``devices``, joined to one communicator with this rank on ``device``.

        What does not join is replaced, once. Raises GroupError if that does not help, and where messages did not arrive before:
        finding that out takes minutes, and what helps is for the next start of ComfyUI.
        """
        if said := self._silent.get(tuple(devices)):
            raise GroupError(f"{said} (found out in an earlier run, tried again when ComfyUI has been restarted)")
        with self._lock:
            if device != self._device:
                self._leave()
            self._device = device
            for last in (False, True):
                try:
                    self.warm(devices)
                    if self._comm is None or self._comm.aborted or self.lost is not None:
                        self._leave()
                        self._join()
                    else:
                        self._attend()
                    return
                except (RuntimeError, OSError) as error:
                    self.give_up((isinstance(error, CommunicationFailed) and self._told) or str(error))
                    if self._unreached(devices, str(self.lost)) or last:
                        raise GroupError(self.lost) from error
                    log.warning("%s: starting again what did not join", self.lost)

    def _join(self) -> None:
        self._epoch, self.lost, self._told = next(self._epochs), None, None
        for member in self._members:
            if member.greeting is not None:
                member.greeting.join(self.timeouts.start)
            if member.channel is None:
                self._lose(member, f"did not start: {member.unreached}{member.last_line()}", kill=True)
            elif not member.reachable:  # it ended before this run looked
                self._lose(member, member.fate(), kill=True)
            self._check()
        self._watch.wake()
        for member in self._members:
            if not member.ready:
                self._reply(member, "ready", self.timeouts.start)
                member.ready = True
        self._attend()
        store = str(self._pool.directory / f"store{self._epoch}")
        limits = {"collective": self.timeouts.collective, "join": self.timeouts.join}
        for member in self._members:
            member.replies = queue.SimpleQueue()
            member.tell("join", {"epoch": self._epoch, "store": store, "rank": member.rank, "size": self.size, **limits})
        try:
            self._comm = Communicator.join(
                store, f"epoch{self._epoch}", 0, self.size, self._device, self.timeouts.collective, self.timeouts.join, self._check
            )
        except CommunicationFailed as error:
            for rank in error.absent:
                self._lose(self._members[rank - 1], f"did not join within {self.timeouts.join:g} s", kill=True)
            raise
        self._meshes = Meshes(self._comm)
        for member in self._members:
            self._reply(member, "joined", self.timeouts.join)
        self.counts["joins"] += 1

    def _attend(self) -> None:
        """From now on silence counts."""
        for member in self._members:
            member.heard = time.monotonic()
            member.tell("attend")
        self._running = True
        self._watch.wake()

    def _leave(self) -> None:
        """Drop the communicator; workers stay."""
        comm, self._comm, self._meshes, self._link = self._comm, None, None, None
        self._flights.clear()
        if comm is not None:
            comm.abort()
            comm.close()

    def close(self) -> None:
        """End every worker."""
        with self._lock:
            self._leave()
            self._running = False
            members, self._members = self._members, []
            for member in members:
                member.end()
            self._pool.stop()

    # -- health: called by the watch thread, see ``Watched`` ----------------------------------------------------------

    def silence(self) -> float | None:
        return self.timeouts.heartbeat if self._running else None

    def pause(self) -> float:
        if self._running or not self._unwanted.empty():
            return min(1.0, self.timeouts.heartbeat / 4)
        return max(1.0, self.timeouts.idle / 10)

    def hear(self, member: Member, kind: str, payload: Any) -> None:
        if kind == "said":
            self._sayings.put((member.device, payload))
        elif kind == "dropped":
            member.models.pop(payload, None)
        elif kind != "failed":
            member.replies.put((kind, payload))
        elif payload["epoch"] == self._epoch:
            if payload["peer"] and self._comm is not None:
                self._told = self._told or f"{member}: {payload['message']}"
                self._abort()  # whose fault it was is heard from another member, or not at all
            else:
                self._lose(member, f"failed: {payload['message']}", kill=False)

    def lose(self, member: Member, what: str) -> None:
        self._lose(member, what, kill=True)

    def tend(self) -> None:
        members = list(self._members)
        if self.lost is None and (limit := self._flights.overdue()) is not None:  # this rank may wait for the device in anybody's code
            for member in [member for member in members if not member.waits] or members:
                self._lose(member, f"did not get on for {limit:.0f} s{member.last_line()}", kill=True)
        if not self._lock.acquire(blocking=False):
            return  # whoever has it does the same, or the next look does
        try:
            self._drop_unwanted()
            if self._members and not self._running and time.monotonic() - self._last_use > self.timeouts.idle:
                log.info("no prompt for %g s: the workers leave", self.timeouts.idle)
                self.close()
        finally:
            self._lock.release()

    # -- losses -------------------------------------------------------------------------------------------------------

    def _lose(self, member: Member, what: str, *, kill: bool) -> None:
        """Keep the first loss, and have everyone stop waiting. A member that is well, its failure apart, is not killed."""
        if kill and member.channel is not None:
            member.channel.close()  # frees a thread that talks to it
        if self.lost is None and member in self._members:
            self.lost = f"{member} {what}"
            if self._running:
                log.warning("%s. The last it printed:\n%s", self.lost, member.process.tail(40))
            self._abort()
        if kill:
            member.process.kill()

    def _abort(self) -> None:
        if self._comm is not None:
            self._comm.abort()
        for member in self._members:
            if member.reachable:
                member.urge("abort", self._epoch)

    def _check(self) -> None:
        """For a thread that waits for other ranks. Raises RankLost."""
        if self.lost is None:
            tried = self._patience.tried(self._members)
            self._mute = bool(tried) and all(member.waits for member in tried)
            for member in tried:
                self._lose(member, f"did not get on for {self._patience.limit:.0f} s{member.last_line()}", kill=True)
        if self.lost is not None:
            raise RankLost(self.lost)

    def _reply(self, member: Member, kind: str, timeout: float) -> Any:
        """The payload of the member's next answer of ``kind``. Raises RankLost."""
        try:
            return next_of(member, kind, timeout, self._check)
        except TimeoutError:
            self._lose(member, f"did not answer within {timeout:g} s{member.last_line()}", kill=True)
            raise RankLost(self.lost) from None

    def give_up(self, reason: str) -> None:
        """No more steps with this communicator: members that wait for this rank are told."""
        self.lost = self.lost or reason
        self._abort()
        self._rest()

    @contextmanager
    def _shared(self) -> Iterator[None]:
        """Around what other ranks wait in: any error gives the communicator up. Exceptions become RankLost, this rank's
        own too, because what failed when shared may work alone."""
        try:
            self._check()
            yield
            self._check()
        except Exception as error:  # noqa: BLE001  kernels and compiled code raise anything
            touch = self._told or str(error)  # what is told from here on comes of this rank's own failure
            deadline = time.monotonic() + (_EXPLAINED if isinstance(error, CommunicationFailed) else 0.0)
            while self.lost is None and time.monotonic() < deadline:
                time.sleep(0.01)
            if isinstance(error, CommunicationFailed):
                self.give_up(f"the ranks lost touch: {touch}")
            else:
                self.give_up(str(error) if isinstance(error, RankLost) else f"rank 0 failed: {one_line(error)}")
            raise RankLost(self.lost) from error
        except BaseException as error:
            self.give_up(f"rank 0 stopped: {type(error).__name__}")
            raise

    # -- runs ---------------------------------------------------------------------------------------------------------

    def link(self) -> Link:
        """How fast this communicator's ranks talk, measured once. Raises RankLost."""
        if self._link is None:
            self._mute = False
            try:
                with self._shared(), self._patience.within(2 * PATIENCE):  # ranks that do not even connect: the device has nothing to do
                    assert self._comm is not None
                    for member in self._members:
                        member.tell("measure")
                    self._link = measure(self._comm, self._device)
            except RankLost as lost:
                said = str(lost)
                if self._mute and self._device.type == "cuda":  # within NCCL, which has not come to the device
                    said = f"{said}; messages between the GPUs do not arrive; {REMEDY}"
                self._unreached([member.device for member in self._members], said)
                raise RankLost(said) from lost
        return self._link

    def _unreached(self, devices: Sequence[str], reason: str) -> bool:
        """Whether messages did not arrive, which is the same in the next run: kept for it."""
        if REMEDY in reason:
            self._silent[tuple(devices)] = reason
        return REMEDY in reason

    def rates(self, dtype: torch.dtype) -> tuple[float, ...]:
        """Operations a second of every worker's matrix products, by rank, each measured once. Raises RankLost."""
        with self._shared():
            asked = [member for member in self._members if dtype not in member.rates]
            for member in asked:
                member.tell("rate", dtype_name(dtype))
            for member in asked:
                member.rates[dtype] = self._reply(member, "rate", self.timeouts.load)
        return tuple(member.rates[dtype] for member in self._members)

    def sayings(self) -> Iterator[tuple[str, str]]:
        """What workers have had to say of this run since the last look: their devices, and sentences for the user."""
        while not self._sayings.empty():
            yield self._sayings.get()

    def begin(self, **run: Any) -> None:
        """Sampling starts; ``run`` is told to every worker. Raises RankLost."""
        self._sayings = queue.SimpleQueue()
        self._patience.begin(self.timeouts.stuck * (_COMPILING if run.get("compiled") else 1), self.timeouts.slowest)
        with self._shared():
            for member in self._members:
                member.tell("begin", run)

    @contextmanager
    def step(self, order: Mapping[str, Any], ahead: Callable[[], bool] = lambda: False) -> Iterator[tuple[Mesh, Comm]]:
        """Send ``order`` (see ``Worker.on_step``) and yield this rank's mesh and the communicator of all its ranks.

        The body is this rank's share. Its exceptions become RankLost; after what is none, as a cancel, the group is given up too,
        because its ranks would wait for this one. Raises Untransportable before anything is sent.
        ahead: asked after the body, whether the forward's end is waited for later, by ``land`` or by a step that is not ahead.
        """
        header, tensors = encode(dict(order))
        with self._shared(), self._patience.step():
            assert self._comm is not None and self._meshes is not None
            layout = laid_out(tensors)
            for member in self._members:  # who gets ready while the tensors are copied
                member.tell("step", {"order": header, "layout": layout})
            self._comm.broadcast(filled(tensors, layout, self._device))
            degrees = Degrees(*order["degrees"])
            mesh = self._meshes.mesh(degrees, order.get("speeds", ()))
            assert mesh is not None, "rank 0 is in every mesh"
            yield mesh, self._comm.split(range(degrees.world))
            if (patience := self._patience.of_a_step()) is not None and ahead():
                self._flights.begin(self._comm.mark(), patience)
            else:
                self._comm.settle()
                self._flights.clear()
        self.counts["steps"] += 1

    @property
    def under_way(self) -> int:
        """Forwards of steps whose end nobody has waited for: what they computed is theirs only once they have landed."""
        return len(self._flights)

    def land(self, leaving: int = 0) -> None:
        """Wait for forwards that are under way, but for the last ``leaving``. Raises RankLost."""
        while len(self._flights) > leaving:
            with self._shared():
                assert self._comm is not None
                self._comm.settle(reached=self._flights.first)
            self._flights.landed()

    def measure(self, exchanged: Exchanged | None) -> None:
        """Count and time there what this rank exchanges with the others, until the run ends."""
        if self._comm is not None:
            self._comm.measure(exchanged)

    def collect(self, source: int, result: torch.Tensor) -> torch.Tensor:
        """Fill ``result`` with what rank ``source`` computed."""
        assert self._comm is not None
        self._comm.shift(result.new_empty(0), source, result, source)()
        return result

    def end(self) -> None:
        """The run is over for the group: workers rest, and those that were lost are started again for the next one.

        What was lost in the middle of a step is gone then: a message that is still arriving beside the current stream would be
        written to memory that belongs to someone else by now.
        """
        self._rest()
        self._flights.clear()
        if self.lost is not None:
            with self._lock:
                self._leave()
            self.expect([member.device for member in self._members])

    def _rest(self) -> None:
        self._running = False
        self._last_use = time.monotonic()
        for member in self._members:
            if member.reachable:
                try:
                    member.tell("end")
                except RankLost:
                    continue
        self._watch.wake()
