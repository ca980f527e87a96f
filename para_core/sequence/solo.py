"""A mesh of one rank, for running the same hooks without anyone to exchange with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .mesh import Mesh


class Solo:
    """A communicator of one rank: collectives are copies or nothing."""

    rank = 0
    size = 1

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor, received_sizes: Sequence[int], sent_sizes: Sequence[int]) -> None:
        if received_sizes[0] and sent_sizes[0]:
            received.copy_(sent)

    def start_all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, received_sizes: Sequence[int], sent_sizes: Sequence[int]
    ) -> Callable[[], None]:
        self.all_to_all(received, sent, received_sizes, sent_sizes)
        return lambda: None

    def all_reduce(self, tensor: torch.Tensor) -> None:
        pass

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> None:
        pass

    def settle(self, timeout_s: float | None = None) -> None:
        pass

    def shift(self, sent: torch.Tensor, to: int, received: torch.Tensor, source: int) -> Callable[[], None]:
        received.copy_(sent)
        return lambda: None


SOLO = Solo()
SOLO_MESH = Mesh(sequence=SOLO, ulysses=SOLO, ring=SOLO)
