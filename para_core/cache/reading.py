"""Numbers that are read from the device without waiting for what it has still to do."""

from __future__ import annotations

import torch


class Reading:
    """``numbers`` as they are now: later writes into the tensor do not count.

    They are copied behind what the device was given before. Asking for them waits for that, and for nothing that was given after:
    in the middle of a step they are there already.
    """

    def __init__(self, numbers: torch.Tensor):
        self._held: torch.Tensor | list[float] = numbers.to("cpu", non_blocking=True) if numbers.is_cuda else numbers.clone()
        self._there: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._there = torch.cuda.Event()
            self._there.record(torch.cuda.current_stream(numbers.device))

    @property
    def numbers(self) -> list[float]:
        if isinstance(self._held, torch.Tensor):
            if self._there is not None:
                self._there.synchronize()
            self._held = self._held.tolist()
        return self._held

    def __float__(self) -> float:
        """The only number."""
        (number,) = self.numbers
        return number
