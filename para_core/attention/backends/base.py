"""What a local attention kernel is, and the questions it is asked before it gets a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

import torch

MaskKind = Literal["none", "bool", "additive"]
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Request:
    """One kind of call, as far as admission and choice depend on it."""

    dtype: torch.dtype
    device_type: str
    """``cpu``, ``cuda`` (NVIDIA), ``hip`` (AMD) or another device type of torch."""
    capability: tuple[int, int]
    """CUDA compute capability; (0, 0) elsewhere."""
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    mask: MaskKind = "none"
    needs_lse: bool = False
    low_precision_ok: bool = True
    """False where the model forbids kernels that quantise."""
    has_scale: bool = False
    """The call names a scale other than ``head_dim ** -0.5``."""

    @property
    def grouped(self) -> bool:
        """Fewer key than query heads."""
        return self.heads != self.kv_heads


Run = Callable[..., torch.Tensor]
"""``run(q, k, v, *, mask, scale)``: q ``(B, H, S, D)``, k, v ``(B, Hkv, M, D)``, mask 4-D or None -> ``(B, H, S, D)``."""
RunLse = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""The same -> output and the natural log-sum-exp of each row, float32 ``(B, H, S)``, -inf for rows without keys."""


@dataclass(frozen=True)
class Backend:
    """A local attention kernel."""

    name: str
    exact: bool
    """False where it quantises: such a kernel is checked against an exact one, and refused where the model forbids it."""
    install: str
    """The command or advice that installs it."""
    probe: Callable[[], str | None]
    """Why it is missing on this machine, or None. Cached by the backend."""
    refuse: Callable[[Request], str | None]
    """Why it cannot take such a call, or None. Asked only where ``probe`` found it."""
    run: Run
    run_lse: RunLse | None = None
    on_request: bool = False
    """Never chosen for its speed alone: too coarse for that."""


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool or additive mask as an additive one of ``dtype``."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
    return mask.to(dtype)


def rows_without_keys(mask: torch.Tensor) -> torch.Tensor:
    """Which rows of a 4-D mask may attend to nothing: bool ``(b, h, s)``."""
    blocked = ~mask if mask.dtype == torch.bool else mask == float("-inf")
    return blocked.all(-1)


def mark_empty(lse: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Give rows without keys the log-sum-exp -inf: kernels report 0, NaN or +inf there."""
    return lse if mask is None else lse.masked_fill(rows_without_keys(mask), float("-inf"))


def nvidia_only(request: Request, capability: tuple[int, int]) -> str | None:
    """The refusal of a kernel for NVIDIA GPUs from ``capability`` on."""
    if request.device_type != "cuda":
        return f"it runs on NVIDIA GPUs, not on {request.device_type}"
    if request.capability < capability:
        have, need = (".".join(map(str, version)) for version in (request.capability, capability))
        return f"it needs compute capability {need}, this device has {have}"
    return None


def load(name: str, *functions: str) -> ModuleType | str:
    """The package ``name`` if it can be imported and has ``functions``, else why not, in words that end a sentence."""
    try:
        if find_spec(name) is None:
            return f"the package {name} is not installed"
        module = import_module(name)
    # What broken installs raise: missing dependencies, libraries built for another PyTorch, checks at import.
    except (ImportError, OSError, RuntimeError, AttributeError, AssertionError, ValueError, TypeError) as error:
        return f"the package {name} is installed but does not load ({type(error).__name__}: {first_line(error)})"
    missing = [function for function in functions if not hasattr(module, function)]
    return f"the package {name} has no {missing[0]}" if missing else module


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without its full stop."""
    return next(iter(str(error).splitlines()), "").rstrip(".")
