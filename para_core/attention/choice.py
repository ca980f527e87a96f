"""Which local kernel computes a call: by measurement, else by a table; falling back, counting and checking in one place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

import torch

from ..log import log
from .backends import BACKENDS, Backend, Request
from .backends.base import first_line
from .backends.pytorch import run_lse as pytorch_lse
from .call import Call, StockKernel
from .capture import is_captured
from .kernel import Kernel
from .masks import as_4d
from .selfcheck import SelfCheck
from .timings import Timings

SETTINGS = ("auto", "exact", "pytorch", "cudnn", "flash", "sage", "comfy-kitchen")
"""The values of the node's combo."""

LONG = 8192
"""Keys from which quantising kernels win on data-centre GPUs (H100: cuDNN at 4608, Sage at 16896; bf16, head dims 64 and 128)."""
SHORT = 1024
"""Keys below which quantising costs more than it saves."""

Order = Callable[[Request], tuple[str, ...]]


def preferred(request: Request) -> tuple[str, ...]:
    """Names of backends, fastest first, for this kind of call. Those that do not fit or are missing are passed over later."""
    if request.device_type == "hip":
        return ("comfy-kitchen", "pytorch") if request.kv_len >= SHORT else ("pytorch",)
    if request.device_type != "cuda":
        return ("pytorch",)
    if request.capability in ((9, 0), (10, 0), (10, 3)):
        fast = ("cudnn", "flash", "pytorch")
        return ("sage", *fast) if request.kv_len >= LONG else fast
    exact = ("flash", "pytorch", "cudnn")
    return ("sage", "comfy-kitchen", *exact) if request.kv_len >= SHORT else exact


def wanted(setting: str) -> tuple[str, ...]:
    """The backends that a setting names itself."""
    if setting in ("auto", "exact"):
        return ()
    return ("sage", "sage3") if setting == "sage" else (setting,)


@dataclass
class Decision:
    """The backends that can take a kind of call, best first, and why better ones cannot."""

    request: Request
    candidates: list[Backend] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


@dataclass
class Chooser:
    """The attention kernels of one sampling run.

    ``setting``: one of ``SETTINGS``, or None for the stock function. ``previous``: the override that was in the graph before;
    it is kept as the local kernel whatever the setting. ``say`` is given each sentence for the user once.
    Raises ``ValueError`` for an unknown setting.
    """

    setting: str | None
    previous: Callable[..., torch.Tensor] | None = None
    say: Callable[[str], None] = log.warning
    table: Iterable[Backend] = BACKENDS
    order: Order = preferred
    """Where nothing has been timed."""
    timings: Timings = field(default_factory=Timings)
    check: SelfCheck = field(default_factory=SelfCheck)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Calls that went to another backend than wanted: (backend used, why the wanted one could not) -> calls."""
    uses: Counter[str] = field(default_factory=Counter)
    """Calls each backend computed."""
    kinds: Counter[tuple[str, Request]] = field(default_factory=Counter)
    """The same, by kind of call."""
    replaced: dict[str, str] = field(default_factory=dict)
    """Backends that failed and are out for the rest of the run -> why."""

    def __post_init__(self) -> None:
        if self.setting is not None and self.setting not in SETTINGS:
            raise ValueError(f"unknown attention backend {self.setting!r}; one of {', '.join(SETTINGS)}")
        self._table = {backend.name: backend for backend in self.table}
        self._decisions: dict[Hashable, Decision] = {}
        self._said: set[str] = set()
        self.will_capture = False
        """Whether CUDA graphs are about to be captured, so that it must be known who can be part of one."""
        self._captured: dict[str, bool] = {}
        self._kernels = {allowed: ChosenKernel(self, allowed) for allowed in (True, False)}
        if self.previous is not None and self.setting not in (None, "auto"):
            self._say_once(f"Another node's attention override is kept, so the attention backend {self.setting} is not used.")

    @property
    def has_lse(self) -> bool:
        """Whether a ring is possible: a foreign override does not give its log-sum-exp."""
        return self.previous is None

    def kernel(self, call: Call) -> Kernel:
        """The local kernel for ``call``: the stock function or previous override, else this run's choice by shape."""
        if self.previous is not None:
            return StockKernel(call, self.previous)
        if self.setting is None:
            return StockKernel(call, lse=pytorch_lse_4d)
        return self._kernels[call.low_precision]

    def begin_forward(self) -> None:
        """A forward starts: the next call is that of its first layer."""
        self.check.begin_forward()

    def end_forward(self) -> bool:
        """Whether the forward's attention can be used. Waits for the device where quantising kernels ran.

        False: a kernel gave NaN or infinity in some call; it is replaced for the rest of the run, and the forward should be
        computed again. Ranks decide that together.
        """
        broken = self.check.broken()
        for name in broken:
            self.replace(name, "its output has NaN or infinity")
        return not broken

    def replace(self, name: str, reason: str) -> None:
        """Do not use backend ``name`` for the rest of the run, and say so. The exact kernel of last resort stays."""
        if name == "pytorch":
            return
        self.replaced[name] = reason
        self._decisions.clear()
        self._say_once(f"Attention backend {name} is not used for the rest of this run: {reason}.")

    def measure(self, device: torch.device) -> list[str]:
        """Time the kernels for the kinds of call that were new in the last forward; later ones go to the fastest."""
        kinds = self.timings.measure(device)
        if kinds:
            self._decisions.clear()
        return kinds

    def learn(self, table: dict[str, dict[str, float]]) -> None:
        """Take over times that another rank measured."""
        self.timings.table.update(table)
        self._decisions.clear()

    def mind_capture(self, backend: Backend, q: torch.Tensor) -> None:
        """Try once whether a CUDA graph holds ``backend``'s kernel. Raises RuntimeError in a capture that would not."""
        if torch.cuda.is_current_stream_capturing():
            if not self._captured.get(backend.name, False):
                raise RuntimeError(f"attention backend {backend.name} launches its kernels where a CUDA graph does not see them")
        elif self.will_capture and backend.name not in self._captured:
            self._captured[backend.name] = is_captured(backend, q.device, q.dtype, q.shape[3])

    def exclude(self, decision: Decision, backend: Backend, reason: str) -> None:
        """``backend`` failed on such a call: pass it over for this kind of call."""
        decision.candidates.remove(backend)
        decision.reasons.append(f"{backend.name}: {reason}")
        self._say_once(f"Attention backend {backend.name} failed and is replaced: {reason}.")

    def decide(
        self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scale: float | None, *, needs_lse: bool, low_precision_ok: bool
    ) -> Decision:
        """The backends for such a call, decided once per kind of call."""
        kind = None if mask is None else mask.dtype
        key = (q.dtype, q.device, q.shape, k.shape, kind, scale is None, needs_lse, low_precision_ok)
        decision = self._decisions.get(key)
        if decision is None:
            request = request_of(q, k, mask, scale, needs_lse=needs_lse, low_precision_ok=low_precision_ok)
            decision = self._decisions[key] = self._decide(request)
        return decision

    def _decide(self, request: Request) -> Decision:
        explicit = wanted(self.setting or "auto")
        # Whoever names an exact kernel does not want a quantising one in its place.
        exact_only = self.setting == "exact" or any(self._table[name].exact for name in explicit if name in self._table)
        decision = Decision(request)
        order = (self.timings.ranked(request) if len(explicit) == 0 else None) or self.order(request)
        for name in dict.fromkeys((*explicit, *order, "pytorch")):
            backend = self._table.get(name)
            if backend is None or (exact_only and not backend.exact):
                continue
            missing = backend.probe()
            if missing is not None and name in explicit[:1]:
                self._say_once(f"Attention backend {name} is not available here: {missing}. To install it: {backend.install}.")
            elif missing is not None:
                continue
            reason = missing or self.replaced.get(name) or self._refusal(backend, request)
            if reason is None:
                decision.candidates.append(backend)
            elif not decision.candidates:
                decision.reasons.append(f"{name}: {reason}")
        return decision

    @staticmethod
    def _refusal(backend: Backend, request: Request) -> str | None:
        if not backend.exact and not request.low_precision_ok:
            return "the model forbids quantised attention here"
        if request.needs_lse and backend.run_lse is None:
            return "it gives no log-sum-exp"
        return backend.refuse(request)

    def forecast(
        self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scale: float | None, *, needs_lse: bool, low_precision_ok: bool
    ) -> tuple[Backend | None, float | None]:
        """What would compute such a call (None: the stock function or another node's), and its measured seconds if they are known."""
        if self.setting is None or self.previous is not None:
            return None, None
        decision = self.decide(q, k, mask, scale, needs_lse=needs_lse, low_precision_ok=low_precision_ok)
        backend = decision.candidates[0]
        return backend, self.timings.seconds(decision.request, backend.name, batch=q.shape[0])

    def report(self) -> list[str]:
        """What computed the calls of this run, one line per backend and per reason for falling back."""
        lines = [f"{name}: {calls} calls" for name, calls in self.uses.most_common()]
        return lines + [f"{used} instead of {reason} ({calls} calls)" for (used, reason), calls in self.counts.most_common()]

    def _say_once(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            self.say(sentence)


@dataclass(frozen=True, eq=False)
class ChosenKernel:
    """The chooser's kernel for calls that may, or may not, be quantised. Lives as long as the run."""

    chooser: Chooser
    low_precision_ok: bool = True

    @property
    def has_lse(self) -> bool:
        return True

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None, scale: float | None) -> torch.Tensor:
        return self._compute(q, k, v, mask, scale, needs_lse=False)[0]

    def run_lse(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None, scale: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = self._compute(q, k, v, mask, scale, needs_lse=True)
        assert lse is not None
        return out, lse

    def _compute(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None, *, needs_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        chooser = self.chooser
        if mask is not None:
            mask = as_4d(mask)
        chooser.check.next_call()
        while True:
            decision = chooser.decide(q, k, mask, scale, needs_lse=needs_lse, low_precision_ok=self.low_precision_ok)
            backend = decision.candidates[0]
            last = len(decision.candidates) == 1
            if q.is_cuda:
                chooser.mind_capture(backend, q)
            try:
                out, lse = _run(backend, q, k, v, mask, scale, needs_lse=needs_lse)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - kernels of others raise anything, from Triton's compiler to assertions
                if last:
                    raise
                chooser.exclude(decision, backend, f"{type(error).__name__}: {first_line(error)}")
                continue
            if not backend.exact and not last:
                fault = chooser.check.fault(decision.request, backend.name, q, k, v, mask, scale, out, lse)
                if fault is not None:
                    chooser.replace(backend.name, fault)
                    continue
            chooser.uses[backend.name] += 1
            chooser.kinds[backend.name, decision.request] += 1
            for reason in decision.reasons:
                chooser.counts[backend.name, reason] += 1
            return out, lse


def request_of(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    *,
    needs_lse: bool = False,
    low_precision_ok: bool = True,
) -> Request:
    """Describe a call on q ``(B, H, S, D)`` and k ``(B, Hkv, M, D)``."""
    kind = q.device.type
    capability = (0, 0)
    if kind == "cuda":
        if torch.version.hip:
            kind = "hip"
        else:
            capability = torch.cuda.get_device_capability(q.device)
    return Request(
        q.dtype,
        kind,
        capability,
        q.shape[1],
        k.shape[1],
        q.shape[2],
        k.shape[2],
        q.shape[3],
        "none" if mask is None else "bool" if mask.dtype == torch.bool else "additive",
        needs_lse,
        low_precision_ok,
        scale is not None,
    )


def pytorch_lse_4d(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact kernel with log-sum-exp, for a mask of any form."""
    return pytorch_lse(q, k, v, mask=None if mask is None else as_4d(mask), scale=scale)


def _run(
    backend: Backend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None, *, needs_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not needs_lse:
        return backend.run(q, k, v, mask=mask, scale=scale), None
    assert backend.run_lse is not None, "the choice has looked at it"
    return backend.run_lse(q, k, v, mask=mask, scale=scale)
