"""Small tables that stock code makes on the host in every forward, kept on the device so that a CUDA graph can be captured.

A capture refuses copies from ordinary host memory. What a forward copies is made from shapes and numbers that are part of
the capture's identity (a value of a device tensor cannot get there without a wait that a capture refuses as well), so the
copy of the forward before the capture is as good.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Constants(TorchDispatchMode):
    """While it is entered: copies from the host to ``device_type`` are remembered by content, or answered from memory."""

    def __init__(self, device_type: str = "cuda"):
        super().__init__()
        self.device_type = device_type
        self.held: dict[Hashable, torch.Tensor] = {}
        self.answering = False
        """True during a capture: what is not remembered is copied after all, and the capture fails."""
        self._entered = 0

    def __enter__(self):
        self._entered += 1
        return super().__enter__()

    def __exit__(self, *error):
        self._entered -= 1
        return super().__exit__(*error)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Out of the way of what cannot run under it, such as compiled code."""
        if not self._entered:
            yield
            return
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten.copy_.default and self._crosses(args[1], args[0].device):
            target = args[0].device
            return func(args[0], self._copy(args[1], ("copy", target), lambda: args[1].to(target)), *args[2:])
        target = destination(func, args, kwargs)
        if target is not None and self._crosses(args[0], target):
            return self._copy(args[0], (str(func), str(args[1:]), str(kwargs)), lambda: func(*args, **kwargs))
        return func(*args, **kwargs)

    def _crosses(self, source: Any, target: torch.device) -> bool:
        return type(source) in (torch.Tensor, torch.nn.Parameter) and source.device.type == "cpu" and target.type == self.device_type

    def _copy(self, source: torch.Tensor, how: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        content = source.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if source.numel() else b""
        key = (how, tuple(source.shape), source.dtype, sha256(content).digest())
        if self.answering and key in self.held:
            return self.held[key].clone()
        made = make()
        if key not in self.held:  # a capture may read what is held, whose memory nothing else keeps
            self.held[key] = made.clone()
        return made


def destination(func: Any, args: tuple, kwargs: dict[str, Any]) -> torch.device | None:
    """Where a call of ``Tensor.to`` moves its tensor to; None for other operations, and where it stays."""
    if func in (aten._to_copy.default, aten.to.dtype_layout):
        found = kwargs.get("device")
    elif func is aten.to.device:
        found = args[1]
    elif func is aten.to.other:
        found = args[1].device
    else:
        return None
    return None if found is None else torch.device(found)
