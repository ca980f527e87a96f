"""Rank 0's side of the sidecar group: members, their health, communicators, models, and the steps they share.

Processes outlive communicators: after a failure the communicator is dropped, the processes that are still well keep
their weights, and the next run joins them to a new one.
"""

from __future__ import annotations

import hashlib
import itertools
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from ..log import log
from ..sequence.mesh import Comm, Degrees, Mesh
from .channel import Channel, ChannelClosed
from .codec import as_bytes, encode, pack
from .communicator import Communicator, Meshes
from .pool import Pool, WorkerProcess
from .weights import manifest, share


class RankLost(RuntimeError):
    """A rank died, hung or failed while others depended on it; the message carries its last lines."""


class GroupError(RuntimeError):
    """The group could not be formed, or the ranks do not hold the same weights."""


@dataclass
class Timeouts:
    """Seconds. ``heartbeat``: silence of a busy worker after which it counts as hung. ``idle``: without any run, then they leave."""

    start: float = 180.0
    join: float = 60.0
    load: float = 1800.0
    heartbeat: float = 20.0
    collective: float = 1800.0
    idle: float = 900.0


@dataclass(eq=False)
class Member:
    """One sidecar. ``models``: what it holds, by model id: the hash of the patches applied there."""

    rank: int
    device: str
    process: WorkerProcess
    channel: Channel | None = None
    ready: bool = False
    heard: float = 0.0
    replies: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    models: dict[int, str] = field(default_factory=dict)

    def tell(self, kind: str, payload: Any = None) -> None:
        """Raises RankLost if the worker has gone."""
        assert self.channel is not None
        try:
            self.channel.tell(kind, payload)
        except ChannelClosed as error:
            raise RankLost(f"rank {self.rank} has ended") from error


class Group:
    """For one thread at a time (ComfyUI's prompt thread); a thread of its own listens to the members.

    script: the file workers run. hello: plain data a new worker is told first, by rank, device and group size.
    ``counts`` says what was done: starts, joins, models and patches sent, steps.
    """

    def __init__(self, script: Path, hello: Callable[[int, str, int], dict[str, Any]]):
        self.timeouts = Timeouts()
        self.counts: Counter[str] = Counter()
        self.lost: str | None = None
        self._device = torch.device("cpu")
        self._pool = Pool(script, {"NCCL_SOCKET_IFNAME": "lo"})
        self._hello = hello
        self._members: list[Member] = []
        self._comm: Communicator | None = None
        self._meshes: Meshes | None = None
        self._epochs = itertools.count(1)
        self._epoch = 0
        self._recent: list[int] = []
        self._running = False
        self._last_use = time.monotonic()
        self._lock = threading.RLock()
        self._woken, self._waker = Pipe(duplex=False)
        self._watcher: threading.Thread | None = None

    @property
    def size(self) -> int:
        """Ranks, this one included."""
        return 1 + len(self._members)

    @property
    def pids(self) -> list[int]:
        return [member.process.pid for member in self._members]

    # -- forming ------------------------------------------------------------------------------------------------------

    def warm(self, devices: Sequence[str]) -> None:
        """Start workers for ranks 1.. on ``devices`` where there are none, without waiting for them."""
        with self._lock:
            self._last_use = time.monotonic()
            if [member.device for member in self._members] == list(devices) and all(member.process.alive() for member in self._members):
                return
            self._leave()
            keep = {member.rank: member for member in self._members if member.rank <= len(devices) and member.process.alive()}
            keep = {rank: member for rank, member in keep.items() if member.device == devices[rank - 1]}
            for member in self._members:
                if member.rank not in keep:
                    self._end(member)
            self._members = [keep.get(rank) or self._start(rank, device) for rank, device in enumerate(devices, start=1)]

    def _start(self, rank: int, device: str) -> Member:
        self.counts["starts"] += 1
        return Member(rank, device, self._pool.start())

    def _end(self, member: Member) -> None:
        if member.channel is not None:
            member.channel.close()
        self._pool.end(member.process)

    def form(self, device: torch.device, devices: Sequence[str]) -> None:
        """Have a worker on each of ``devices``, joined to one communicator with this rank on ``device``.

        Workers that fail to join are replaced, once. Raises GroupError if that does not help.
        """
        with self._lock:
            if device != self._device:
                self._leave()
            self._device = device
            self.warm(devices)
            for last in (False, True):
                if self._comm is not None and self.lost is None:
                    return
                self._leave()
                try:
                    self._join()
                except (RankLost, ChannelClosed, RuntimeError) as error:
                    reason = self.lost or str(error)
                    self._leave()
                    if last:
                        raise GroupError(reason) from error
                    log.warning("starting again what did not join: %s", reason)
                    for member in self._members:
                        if member.replies.empty():
                            member.process.kill()
                    self.warm(devices)

    def _join(self) -> None:
        self.lost = None
        for member in self._members:
            if member.channel is None:
                try:
                    member.channel = member.process.open_channel(self.timeouts.start)
                except ChannelClosed as error:
                    raise RankLost(f"rank {member.rank} on {member.device} did not start: {error}\n{member.process.tail()}") from error
                member.tell("hello", self._hello(member.rank, member.device, self.size))
        self._watch()
        for member in self._members:
            if not member.ready:
                self._reply(member, "ready", self.timeouts.start)
                member.ready = True
        self._epoch = next(self._epochs)
        store = str(self._pool.directory / f"store{self._epoch}")
        limits = {"collective": self.timeouts.collective, "join": self.timeouts.join}
        for member in self._members:
            member.replies = queue.SimpleQueue()
            member.tell("join", {"epoch": self._epoch, "store": store, "rank": member.rank, "size": self.size, **limits})
        self._comm = Communicator.join(
            store, f"epoch{self._epoch}", 0, self.size, self._device, self.timeouts.collective, self.timeouts.join, self._check
        )
        self._meshes = Meshes(self._comm)
        for member in self._members:
            self._reply(member, "joined", self.timeouts.join)
        self.counts["joins"] += 1

    def _leave(self) -> None:
        """Drop the communicator; workers stay."""
        comm, self._comm, self._meshes = self._comm, None, None
        if comm is not None:
            comm.abort()
            comm.close()

    def close(self) -> None:
        """End every worker."""
        with self._lock:
            self._leave()
            members, self._members = self._members, []
            for member in members:
                self._end(member)
            self._pool.stop()
            self._wake()

    # -- health -------------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        self._waker.send_bytes(b"w")

    def _watch(self) -> None:
        """Have the watch thread look at the present members."""
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._listen, name="paradit-watch", daemon=True)
            self._watcher.start()
        self._wake()

    def _listen(self) -> None:
        while True:
            members = self._listening()
            limit = self.timeouts
            quiet = min(1.0, limit.heartbeat / 4) if self._running else max(1.0, limit.idle / 10)
            try:
                ready = wait([self._woken, *members], timeout=quiet if members else None)
            except OSError:  # a channel was closed meanwhile
                continue
            for item in ready:
                if item is self._woken:
                    self._woken.recv_bytes()
                elif isinstance(item, int):
                    self._hear(members[item])
            now = time.monotonic()
            if self._running:
                for member in members.values():
                    if now - member.heard > limit.heartbeat:
                        self._lose(member, f"gave no sign of life for {limit.heartbeat:g} s", kill=True)
            elif members and now - self._last_use > limit.idle and self._lock.acquire(blocking=False):
                try:
                    log.info("no prompt for %g s: the workers leave", limit.idle)
                    self.close()
                finally:
                    self._lock.release()

    def _listening(self) -> dict[int, Member]:
        """Members with an open channel, by its file descriptor."""
        members = {}
        for member in list(self._members):
            if member.channel is not None and not member.channel.closed:
                try:
                    members[member.channel.fileno()] = member
                except OSError:  # closed between the two lines
                    continue
        return members

    def _hear(self, member: Member) -> None:
        assert member.channel is not None
        try:
            kind, payload = member.channel.hear()
        except ChannelClosed:
            self._lose(member, "ended", kill=True)
            return
        member.heard = time.monotonic()
        if kind == "failed":
            member.ready = True
            if payload["epoch"] == self._epoch:
                self._lose(member, f"failed: {payload['message']}", kill=False)
        elif kind != "beat":
            member.replies.put((kind, payload))

    def _lose(self, member: Member, what: str, *, kill: bool) -> None:
        """Note the first loss, and have everyone stop waiting."""
        if kill:
            if member.channel is not None:
                member.channel.close()
            member.process.kill()
        if self.lost is None and member in self._members:
            tail = member.process.tail(5)
            self.lost = f"rank {member.rank} on {member.device} {what}" + (f"\n{tail}" if tail else "")
            self._abort()

    def _abort(self) -> None:
        if self._comm is not None:
            self._comm.abort()
        for member in self._members:
            if member.channel is not None and not member.channel.closed:
                try:
                    member.channel.tell("abort", self._epoch)
                except ChannelClosed:
                    continue

    def _check(self) -> None:
        if self.lost is not None:
            raise RankLost(self.lost)

    def _reply(self, member: Member, kind: str, timeout: float) -> Any:
        """The payload of the member's next answer, which must be of ``kind``. Raises RankLost."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                found, payload = member.replies.get(timeout=0.05)
            except queue.Empty:
                self._check()
                if time.monotonic() > deadline:
                    raise RankLost(f"rank {member.rank} on {member.device} did not answer within {timeout:g} s\n{member.process.tail(5)}") from None
                continue
            if found == kind:
                return payload

    # -- models -------------------------------------------------------------------------------------------------------

    def load(self, model: int, recipe: Mapping[str, Any], tensors: Callable[[], Mapping[str, torch.Tensor]], patches: list) -> None:
        """Have every rank hold ``model`` with ``patches`` applied; sends only what is missing.

        tensors: called if weights must travel. Raises RankLost, GroupError where fingerprints differ.
        """
        self._recent = [known for known in self._recent if known != model] + [model]
        if any(model not in member.models for member in self._members):
            self._share(model, recipe, tensors())
        header, contents = encode(patches)
        digest = content_hash(header, contents)
        missing = [member for member in self._members if member.models[model] != digest]
        for member in missing:
            member.tell("patches", {"id": model, "patches": patches, "hash": digest})
        for member in missing:
            member.models[model] = self._reply(member, "patched", self.timeouts.load)
            self.counts["patches"] += 1

    def _share(self, model: int, recipe: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        order = {"id": model, "recipe": dict(recipe), "manifest": manifest(tensors)}
        for member in self._members:
            member.tell("model", order)
        sent = share(tensors, self._joined(), self._device)
        for member in self._members:
            if self._reply(member, "loaded", self.timeouts.load) != sent:
                member.process.kill()
                raise GroupError(f"rank {member.rank} received other weights than were sent")
            member.models.setdefault(model, content_hash(*encode([])))
        self.counts["models"] += 1

    def drop(self, model: int) -> None:
        """Free a model everywhere."""
        self._recent = [known for known in self._recent if known != model]
        for member in self._members:
            if member.models.pop(model, None) is not None and member.channel is not None and not member.channel.closed:
                try:
                    member.tell("drop", model)
                except RankLost:
                    continue

    # -- runs ---------------------------------------------------------------------------------------------------------

    def _joined(self) -> Communicator:
        self._check()
        if self._comm is None:
            raise RankLost("the group has no communicator")
        return self._comm

    def begin(self, **run: Any) -> None:
        """A sampling run starts; ``run`` is told to every worker. Raises RankLost."""
        self._joined()
        for member in self._members:
            member.heard = time.monotonic()
            member.tell("begin", run)
        self._running = True
        self._wake()

    @contextmanager
    def step(self, order: Mapping[str, Any]) -> Iterator[tuple[Mesh, Comm]]:
        """Send ``order`` (see ``Worker.on_step``) and yield this rank's mesh and the communicator of all its ranks.

        The body is this rank's share. RuntimeErrors of a body whose group was lost become RankLost; after any other error
        the group is given up, because its ranks would wait for this one.
        """
        try:
            comm = self._joined()
            header, tensors = encode(dict(order))
            buffer, layout = pack(tensors, self._device)
            for member in self._members:
                member.tell("step", {"order": header, "layout": layout})
            comm.broadcast(buffer)
            degrees = Degrees(*order["degrees"])
            assert self._meshes is not None
            mesh = self._meshes.mesh(degrees)
            assert mesh is not None, "rank 0 is in every mesh"
            yield mesh, comm.split(range(degrees.world))
            comm.settle()
            self._check()
            self.counts["steps"] += 1
        except RankLost:
            self.give_up("a step was not finished")
            raise
        except RuntimeError as error:
            self._explain()
            self.give_up(f"rank 0 failed: {error}")
            if self.lost != f"rank 0 failed: {error}":
                raise RankLost(self.lost) from error
            raise
        except BaseException as error:
            self.give_up(f"rank 0 stopped: {type(error).__name__}")
            raise

    def collect(self, source: int, result: torch.Tensor) -> torch.Tensor:
        """Fill ``result`` with what rank ``source`` computed."""
        self._joined().shift(result.new_empty(0), source, result, source)()
        return result

    def _explain(self) -> None:
        """A collective failed here: the watch thread hears why in a moment, if a peer is the cause."""
        deadline = time.monotonic() + 2.0
        while self.lost is None and time.monotonic() < deadline:
            time.sleep(0.01)

    def give_up(self, reason: str) -> None:
        """No more steps with this communicator; members that wait for this rank are told."""
        if self.lost is None:
            self.lost = reason
        self._abort()
        self._running = False

    def end(self) -> None:
        """The run is over."""
        self._running = False
        self._last_use = time.monotonic()
        for member in self._members:
            try:
                member.tell("end")
            except RankLost:
                continue


def content_hash(header: str, tensors: Sequence[torch.Tensor]) -> str:
    """A hash of plain data with its tensors' bytes."""
    digest = hashlib.sha256(header.encode())
    for tensor in tensors:
        digest.update(as_bytes(tensor).cpu().numpy().data)
    return digest.hexdigest()
