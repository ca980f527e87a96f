"""A noise level that is read without waiting for what the device has still to do."""

from __future__ import annotations

import torch


class Level:
    """The first number of ``sigmas``, as it is now: later writes into the tensor do not count.

    It is copied behind what the device was given before. ``float()`` waits for that, and for nothing that was given after:
    asked for in the middle of a step, it is there already.
    """

    def __init__(self, sigmas: torch.Tensor | None):
        self._there: torch.cuda.Event | None = None
        if sigmas is None or not sigmas.numel():
            sigmas = torch.zeros(1)
        self._number: torch.Tensor | float = sigmas.flatten()[:1].to("cpu", non_blocking=sigmas.is_cuda, copy=True)
        if sigmas.is_cuda:
            self._there = torch.cuda.Event()
            self._there.record(torch.cuda.current_stream(sigmas.device))

    def __float__(self) -> float:
        if isinstance(self._number, torch.Tensor):
            if self._there is not None:
                self._there.synchronize()
            self._number = float(self._number)
        return self._number
