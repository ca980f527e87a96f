"""Measured speed of the local kernels: timed once per kind of call, remembered, and asked for the fastest.

A kind of call that has not been timed yet is answered from a fixed table (``choice.preferred``) and noted; ``measure`` times
what was noted, between two forwards. Rank 0 alone measures: other ranks are given its table, so that all choose alike.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

from ..log import log
from .backends import BACKENDS, Backend, Request
from .backends.base import first_line
from .contest import contest, cuda_laps, figures

Milliseconds = dict[str, float]
"""Backend -> time of one call of a kind."""
Timer = Callable[..., list[float]]
"""``timer(calls, device=...)``: runs calls one after the other on a device -> milliseconds of each."""

MARGIN = 1.02
"""A kernel that quantises must be this much faster than an exact one to be preferred."""
WORK = 4e12
"""Floating-point operations of a timed call: longer sequences are timed on fewer heads, to stay well under a second."""
DRIVER = Path("/proc/driver/nvidia/version")
"""Linux: the NVIDIA driver's own words, its version first among the numbers."""
PACKAGES = ("sageattention", "flash-attn", "comfy-kitchen")


def kind(request: Request) -> str:
    """The name of a kind of call in the table. Lengths count in classes of half an octave."""
    lengths = "x".join(str(round(2 * math.log2(max(1, length)))) for length in (request.q_len, request.kv_len))
    heads = f"{request.heads}" if not request.grouped else f"{request.heads}/{request.kv_heads}"
    words = [str(request.dtype).removeprefix("torch."), f"heads {heads}", f"length class {lengths}", f"head dim {request.head_dim}"]
    if request.mask != "none":
        words.append(f"{request.mask} mask")
    if request.needs_lse:
        words.append("log-sum-exp")
    return ", ".join(words)


def _apart(name: str) -> str:
    """The name of a kind of call without its heads."""
    return re.sub(r"heads \d+", "", name)


def environment(device: torch.device) -> str:
    """What a timing depends on beside the kind of call: the GPU, its driver, and the packages that bring kernels."""
    words = [torch.cuda.get_device_name(device), f"torch {torch.__version__}", f"cuDNN {torch.backends.cudnn.version()}"]
    if DRIVER.exists() and (found := re.search(r"\d+\.\d+(\.\d+)*", DRIVER.read_text())):
        words.append(f"driver {found.group()}")
    for package in PACKAGES:
        try:
            words.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(words)


@dataclass
class Timings:
    """``path``: the file that remembers them across restarts, or None."""

    path: Path | None = None
    backends: Iterable[Backend] = BACKENDS
    timer: Timer = cuda_laps
    table: dict[str, Milliseconds] = field(default_factory=dict)
    """Kind of call -> what each kernel took; for the device that ``load`` was called for."""
    pending: dict[str, Request] = field(default_factory=dict)
    _environment: str = ""

    def ranked(self, request: Request) -> tuple[str, ...] | None:
        """Backends for such a call, fastest first; noted for ``measure`` where it has not been timed, and None unless it has been for
        another number of heads: ranks that have one head less than the first are never timed themselves."""
        if request.device_type not in ("cuda", "hip"):
            return None
        known = self.table.get(kind(request))
        if known is None:
            self.pending.setdefault(kind(request), request)
            known = next((times for name, times in self.table.items() if times and _apart(name) == _apart(kind(request))), None)
        if known is None:
            return None
        exact = {backend.name: backend.exact for backend in self.backends}
        coarse = {backend.name for backend in self.backends if backend.on_request}  # timed by an earlier release
        names = [name for name in known if name not in coarse]
        return tuple(sorted(names, key=lambda name: known[name] * (1.0 if exact.get(name, True) else MARGIN)))

    def seconds(self, request: Request, name: str, *, batch: int) -> float | None:
        """What backend ``name`` takes for such a call of ``batch`` rows, by what was measured; None where nothing was."""
        known = self.table.get(kind(request), {}).get(name)
        return None if known is None else known * 1e-3 * batch * request.heads / fewer_heads(request).heads

    def load(self, device: torch.device) -> None:
        """Take what the file remembers for this device. A file that cannot be read is left alone, and said in the log."""
        self._environment = environment(device)
        if self.path is None or not self.path.exists():
            return
        try:
            self.table = dict(json.loads(self.path.read_text()).get(self._environment, {}))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            log.warning("%s is not used, because it cannot be read: %s", self.path, first_line(error))

    def measure(self, device: torch.device) -> list[str]:
        """Time every kernel that takes the noted kinds of call, remember it, and return the kinds.

        Uses memory for the tensors of one call. A kernel that fails is left out; the kinds are done either way.
        """
        done = []
        while self.pending:
            name, request = self.pending.popitem()
            try:
                self.table[name] = self._time(request, device)
            except torch.cuda.OutOfMemoryError:
                log.info("attention kernels were not timed for %s: no memory is free", name)
                self.table[name] = {}
            if self.table[name]:
                log.info("attention kernels for %s: %s ms", name, {key: round(ms, 3) for key, ms in self.table[name].items()})
            done.append(name)
        if done:
            self._save()
        return done

    def _time(self, request: Request, device: torch.device) -> Milliseconds:
        request = fewer_heads(request)
        generator = torch.Generator(device).manual_seed(0)

        def tensor(heads: int, rows: int) -> torch.Tensor:
            shape = (1, heads, rows, request.head_dim)
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(request.dtype)

        q, k, v = (tensor(*side) for side in ((request.heads, request.q_len), *[(request.kv_heads, request.kv_len)] * 2))
        mask = None
        if request.mask != "none":
            mask = torch.ones(1, 1, 1, request.kv_len, device=device, dtype=torch.bool)
            mask = mask if request.mask == "bool" else torch.zeros_like(mask, dtype=request.dtype)
        running = ""

        def run(backend: Backend) -> object:
            nonlocal running
            running = backend.name
            function = backend.run_lse if request.needs_lse else backend.run
            assert function is not None
            return function(q, k, v, mask=mask, scale=None)

        calls = {backend.name: partial(run, backend) for backend in self.backends if takes(backend, request) and not backend.on_request}
        while calls:
            try:
                return figures(contest(calls, partial(self.timer, device=device)))
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - kernels of others raise anything; the choice goes on without this one
                log.info("attention kernel %s could not be timed: %s: %s", running, type(error).__name__, first_line(error))
                if calls.pop(running, None) is None:
                    raise
        return {}

    def _save(self) -> None:
        if self.path is None:
            return
        try:
            everything = json.loads(self.path.read_text()) if self.path.exists() else {}
            everything[self._environment] = {**everything.get(self._environment, {}), **self.table}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            written = self.path.with_suffix(".new")
            written.write_text(json.dumps(everything, indent=1) + "\n")
            written.replace(self.path)
        except (OSError, ValueError, AttributeError) as error:
            log.warning("times of attention kernels are not remembered in %s: %s", self.path, first_line(error))


def takes(backend: Backend, request: Request) -> bool:
    """Whether a backend is here and computes such calls."""
    return backend.probe() is None and backend.refuse(request) is None and not (request.needs_lse and backend.run_lse is None)


def fewer_heads(request: Request) -> Request:
    """The same kind of call on as many heads as ``WORK`` allows."""
    each = 4 * request.q_len * request.kv_len * request.head_dim
    groups = request.heads // request.kv_heads
    kv_heads = max(1, min(request.kv_heads, int(WORK / (each * groups))))
    return replace(request, heads=kv_heads * groups, kv_heads=kv_heads)
