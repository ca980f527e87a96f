"""What each member of the group holds, and how models get there."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from .codec import encode
from .communicator import Communicator
from .member import Held, Member, RankLost
from .watch import Watch
from .weights import Unit, manifest, share

if TYPE_CHECKING:
    from .group import Timeouts


class Models:
    """The part of ``Group`` that moves weights; the attributes and methods without a body are the other part's."""

    timeouts: Timeouts
    counts: Counter[str]
    _members: list[Member]
    _comm: Communicator | None
    _device: torch.device
    _unwanted: queue.SimpleQueue[int]
    _lock: threading.RLock
    _watch: Watch

    if TYPE_CHECKING:

        def _shared(self) -> AbstractContextManager[None]: ...

        def _reply(self, member: Member, kind: str, timeout: float) -> Any: ...

        def _lose(self, member: Member, what: str, *, kill: bool) -> None: ...

        def _check(self) -> None: ...

    def load(
        self,
        model: int,
        recipe: Mapping[str, Any],
        target: Held,
        units: Callable[[Collection[str] | None], Sequence[Unit]],
        options: Mapping[str, Any],
    ) -> None:
        """Have every rank hold ``model`` as ``target`` says; sends only what is missing, and nothing if that is nothing.

        units: the weights of the given layers in that state (None: of all layers). options: see ``Host.ready``.
        Raises RankLost, also where fingerprints differ.
        """
        with self._lock:
            self._drop_unwanted()
            self._drop_others(model, opened=False)
            held = [member.models.get(model) for member in self._members]
            found = [one for one in held if one is not None]
            if all(one is not None and one.state == target.state for one in held):
                return
            whole = len(found) < len(held)
            chosen = units(None if whole else target.changed.union(*(one.changed for one in found)))
            with self._shared():
                for member in self._members:
                    member.models.pop(model, None)  # until all of it has arrived
                order = {"id": model, "manifest": manifest(chosen), "size": sum(unit.size for unit in chosen), "options": dict(options)}
                self._share("model", order | {"recipe": dict(recipe)}, chosen) if whole else self._share("patches", order, chosen)
                for member in self._members:
                    member.models[model] = target
            self.counts["models" if whole else "patches"] += 1 if whole else len(self._members)

    def fits(self, model: int, size: int, working: int) -> bool:
        """Whether every rank's device can hold ``model``, ``size`` bytes of weights, and ``working`` bytes to compute in. Others are
        dropped for it. Raises RankLost.
        """
        with self._lock, self._shared():
            for member in self._members:
                member.tell("room", {"id": model, "size": size, "working": working})
            return all([self._reply(member, "room", self.timeouts.load) for member in self._members])

    def opened(self, model: int) -> bool:
        """Whether a worker has opened the file of ``model``."""
        return any(held.opened for member in self._members if (held := member.models.get(model)) is not None)

    def open(self, model: int, origin: Mapping[str, Any], target: Held, patches: list, options: Mapping[str, Any], size: int = 0) -> None:
        """Have every rank open the file of ``model`` itself, with ``patches``; nothing if all have. Raises RankLost, Untransportable.

        size: bytes that it would take whole, with what computing needs. Models that were sent go for it.
        """
        encode(patches)
        with self._lock:
            self._drop_unwanted()
            self._drop_others(model, opened=True)
            missing = [member for member in self._members if member.models.get(model) != target]
            with self._shared():
                for member in missing:
                    member.models.pop(model, None)
                    order = {"id": model, "origin": dict(origin), "patches": patches, "options": dict(options), "size": size}
                    member.tell("open", order)
                for member in missing:
                    self._reply(member, "opened", self.timeouts.load)
                    member.models[model] = target
                    self.counts["opened"] += 1

    def _drop_others(self, model: int, *, opened: bool) -> None:
        """Where ``model`` is held in the other way, as it was for a run that could not have it so, it goes first."""
        for member in self._members:
            held = member.models.get(model)
            if held is not None and held.opened != opened:
                del member.models[model]
                member.tell("drop", model)

    def _share(self, kind: str, order: Mapping[str, Any], units: Sequence[Unit]) -> None:
        for member in self._members:
            member.tell(kind, order)
        assert self._comm is not None
        sent = share(units, self._comm, self._device)
        for member in self._members:
            reply = self._reply(member, "loaded" if kind == "model" else "patched", self.timeouts.load)
            if reply != sent:
                self._lose(member, "received other weights than were sent", kill=True)
                self._check()

    def drop(self, model: int) -> None:
        """Free a model everywhere, soon. For any thread and for finalizers: it takes no lock."""
        self._unwanted.put(model)
        self._watch.wake()

    def _drop_unwanted(self) -> None:
        while not self._unwanted.empty():
            model = self._unwanted.get()
            for member in self._members:
                member.models.pop(model, None)
                if member.reachable and member.ready:
                    try:
                        member.tell("drop", model)
                    except RankLost:
                        continue
