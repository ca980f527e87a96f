"""A sidecar's command loop: joins communicators, holds models, and computes its share of every step.

A message of rank 0 is a kind and plain data; this module answers it. What needs ComfyUI is behind ``Host``.
"""

from __future__ import annotations

import gc
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, Protocol

import torch

from ..sequence.mesh import Comm, Degrees, Mesh
from .channel import Channel, ChannelClosed
from .codec import decode, packed_size, unpack
from .communicator import CommunicationFailed, Communicator, Meshes
from .link import measure
from .member import one_line
from .weights import receive

BEAT = 0.5  # seconds between signs of life during a run

ROOM = 1.25  # memory that must be free for a new model, as a multiple of its weights


class Host(Protocol):
    """What the worker needs of the program whose models it runs."""

    def build(self, recipe: dict[str, Any], device: torch.device) -> Any:
        """A model from its recipe, without weights."""

    def fill(self, model: Any, tensors: dict[str, torch.Tensor]) -> None:
        """Take some of the model's weights, whole layers at a time. They are on the model's device and may be kept."""

    def ready(self, model: Any, options: dict[str, Any]) -> None:
        """All weights are there: see that none is missing, and load the model as ``options`` say."""

    def open_file(self, origin: dict[str, Any], device: torch.device) -> Any:
        """A model from the file that rank 0's came from, for a device that cannot hold it."""

    def load(self, model: Any, patches: list, options: dict[str, Any]) -> None:
        """Load a model from ``open_file`` with these patches in place of those it had."""

    def opened(self, model: Any) -> int | None:
        """Of a model from ``open_file``: its bytes that are on the device now. None for one that was sent."""

    def free_memory(self, device: torch.device) -> int:
        """Bytes that could be allocated on ``device``."""

    def matrix_rate(self, device: torch.device, dtype: str) -> float:
        """Operations a second of ``device``'s matrix products."""

    def begin(self, model: Any, run: dict[str, Any]) -> Any:
        """A runner for one sampling run."""

    def forward(self, runner: Any, share: dict[str, Any], mesh: Mesh, comm: Comm) -> torch.Tensor | None:
        """This replica's share of a step: the result on the mesh's first rank, None on the others."""

    def end(self, runner: Any) -> None:
        """Leave the model as it was."""


class Worker:
    """``leave`` ends the process when rank 0 has gone: it must work while another thread is stuck in a collective."""

    def __init__(self, channel: Channel, host: Host, device: torch.device, leave: Callable[[], None]):
        self.channel, self.host, self.device = channel, host, device
        self._leave = leave
        self._orders: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._attending = threading.Event()
        self._epoch = self._ended = self._taken = 0
        self._comm: Communicator | None = None
        self._meshes: Meshes | None = None
        self._models: dict[int, Any] = {}
        self._runner: Any = None

    def serve(self) -> None:
        """Answer rank 0 until it closes the channel."""
        threading.Thread(target=self._listen, name="paradit-listen", daemon=True).start()
        threading.Thread(target=self._beat, name="paradit-beat", daemon=True).start()
        self.channel.tell("ready")
        while True:
            kind, payload = self._orders.get()
            self._taken += 1
            try:
                self._answer(kind, payload)
            except ChannelClosed:  # also while a failure is being reported: rank 0's end is one for its peers
                self._leave()

    def _answer(self, kind: str, payload: Any) -> None:
        try:
            getattr(self, f"on_{kind}")(payload)
            return
        except ChannelClosed:
            raise
        except Exception as error:  # noqa: BLE001  the process boundary: whatever went wrong is rank 0's to judge
            self._failed(error)
        if not self._usable():  # here the error's frames, and the tensors and CUDA graphs in them, have gone
            self._leave()

    def _listen(self) -> None:
        try:
            while True:
                kind, payload = self.channel.hear()
                if kind == "abort":
                    self._abort(payload)
                else:
                    self._orders.put((kind, payload))
        except ChannelClosed:
            self._leave()

    def _abort(self, epoch: int) -> None:
        """A peer was lost while this rank may wait for it, in a collective or to join; runs beside the main thread."""
        self._ended = max(self._ended, epoch)
        comm = self._comm
        if comm is not None and epoch == self._epoch:
            comm.abort()

    def _beat(self) -> None:
        pause = threading.Event()
        while self._attending.wait():
            comm = self._comm
            done, waiting = comm.progress if comm is not None else (0, False)
            try:
                self.channel.tell("beat", {"progress": [self._epoch, self._taken, done], "waiting": waiting})
            except ChannelClosed:
                return
            pause.wait(BEAT)

    def _failed(self, error: Exception) -> None:
        """Report, then let go of the communicator so that nobody waits for this rank: its peers fail later than this is heard."""
        peer = isinstance(error, CommunicationFailed)
        if not peer:  # what became of a peer is that one's log to tell
            traceback.print_exception(error, file=sys.stderr)
            sys.stderr.flush()
        self.channel.tell("failed", {"epoch": self._epoch, "message": one_line(error), "peer": peer})
        if self._comm is not None:
            self._comm.abort()
        self._drop_runner()

    def _usable(self) -> bool:
        """Free what a failure left behind. False after errors that CUDA never recovers from within a process."""
        gc.collect()
        self._drop_communicator(abort=True)
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()
            except RuntimeError:
                return False
        return True

    def _drop_communicator(self, *, abort: bool) -> None:
        comm, self._comm, self._meshes = self._comm, None, None
        if comm is not None:
            if abort:
                comm.abort()
            comm.close()

    def _drop_runner(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            self.host.end(runner)

    # -- orders -------------------------------------------------------------------------------------------------------

    def on_attend(self, _payload: Any) -> None:
        """A run begins: rank 0 counts on signs of life until it ends."""
        self._attending.set()

    def on_join(self, order: dict[str, Any]) -> None:
        self._drop_runner()
        self._drop_communicator(abort=True)
        self._epoch = order["epoch"]
        limits = order["collective"], order["join"]
        self._comm = Communicator.join(
            order["store"], f"epoch{self._epoch}", order["rank"], order["size"], self.device, *limits, self._check
        )
        self._meshes = Meshes(self._comm)
        self.channel.tell("joined", self._epoch)

    def on_model(self, order: dict[str, Any]) -> None:
        """Receive a model. One that is here already takes the same weights again, for the sake of the others."""
        held = self._models.get(order["id"])
        if held is None:
            self._make_room(ROOM * order["size"])
        model = held if held is not None else self.host.build(order["recipe"], self.device)
        fingerprint = self._fill(model, order)
        self._models[order["id"]] = model
        self.channel.tell("loaded", fingerprint)

    def on_patches(self, order: dict[str, Any]) -> None:
        """Receive the layers of a model that have changed."""
        self.channel.tell("patched", self._fill(self._models[order["id"]], order))

    def _fill(self, model: Any, order: dict[str, Any]) -> int:
        total = 0
        for tensors, fingerprint in receive(order["manifest"], self.comm, self.device):
            total += fingerprint
            self.host.fill(model, tensors)
        self.host.ready(model, order["options"])
        return total % 2**64

    def on_room(self, order: dict[str, Any]) -> None:
        """Could a model be held here, and computed with? Others go for it as for one that arrives."""
        held = self._models.get(order["id"])
        there = None if held is None else self.host.opened(held)
        if held is not None and there is None:
            needed = order["working"]
        else:
            needed = max(ROOM * order["size"], order["size"] + order["working"]) - (there or 0)
        self._make_room(needed, order["id"])
        self.channel.tell("room", self.host.free_memory(self.device) >= needed)

    def on_open(self, order: dict[str, Any]) -> None:
        """Open a model's file, or change the patches of one that is open."""
        model = self._models.pop(order["id"], None)
        if model is None:
            # what was sent is out of ComfyUI's reach; of other models that were opened it makes room itself
            self._make_room(order["size"], sent=True)
            model = self.host.open_file(order["origin"], self.device)
        self.host.load(model, order["patches"], order["options"])
        self._models[order["id"]] = model
        self.channel.tell("opened")

    def _make_room(self, needed: float, kept: int | None = None, *, sent: bool = False) -> None:
        """Drop models, least recently used first, until ``needed`` bytes are free, and tell rank 0 of each.

        kept: one that stays. sent: only such that were sent.
        """
        for number in list(self._models):
            if self.host.free_memory(self.device) >= needed:
                break
            if number != kept and not (sent and self.host.opened(self._models[number]) is not None):
                self.channel.tell("dropped", number)  # at once: what comes after may fail
                self.on_drop(number)

    def on_drop(self, model: int) -> None:
        self._models.pop(model, None)
        gc.collect()
        self._give_back()

    def _give_back(self) -> None:
        """Memory that nothing holds any more, to whoever else wants it."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def on_measure(self, _payload: Any) -> None:
        measure(self.comm, self.device)

    def on_rate(self, dtype: str) -> None:
        self.channel.tell("rate", self.host.matrix_rate(self.device, dtype))

    def on_begin(self, run: dict[str, Any]) -> None:
        self._models[run["model"]] = self._models.pop(run["model"])  # the most recently used one is the last
        self._runner = self.host.begin(self._models[run["model"]], run)

    def on_step(self, order: dict[str, Any]) -> None:
        comm, meshes = self._comm, self._meshes
        if comm is None or meshes is None or self._runner is None:
            return  # a step that rank 0 sent before it heard of a failure here
        buffer = torch.empty(packed_size(order["layout"]), dtype=torch.uint8, device=self.device)
        comm.broadcast(buffer)
        step = decode(order["order"], unpack(buffer, order["layout"]), self.device)
        degrees = Degrees(*step["degrees"])
        mesh = meshes.mesh(degrees, step.get("speeds", ()))
        if mesh is None:
            return
        replica = comm.rank // degrees.sequence
        everyone = comm.split(range(degrees.world))
        result = self.host.forward(self._runner, step["shares"][replica], mesh, everyone)
        if result is not None:
            comm.shift(result.contiguous(), 0, result.new_empty(0), 0)()

    def on_end(self, _payload: Any) -> None:
        """A run is over: weights stay, what it computed in does not, of which torch would keep more with every new size."""
        self._attending.clear()
        self._drop_runner()
        self._give_back()

    def _check(self) -> None:
        if self._ended >= self._epoch:
            raise CommunicationFailed("rank 0 has given this communicator up")

    @property
    def comm(self) -> Communicator:
        if self._comm is None:
            raise RuntimeError("no communicator has been joined")
        return self._comm
