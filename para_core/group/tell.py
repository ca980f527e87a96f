"""Plain data and tensors from the first rank of a communicator to the others, in the middle of a step."""

from __future__ import annotations

import json
from typing import Any

import torch

from ..sequence.mesh import Comm
from .codec import decode, encode, pack, packed_size, unpack


def tell(comm: Comm, value: Any, device: torch.device) -> None:
    """On the first rank: send ``value``. Raises Untransportable, before anything is sent, for what is no plain data."""
    header, tensors = encode(value)
    buffer, layout = pack(tensors, device)
    data = torch.frombuffer(bytearray(json.dumps([header, layout]).encode()), dtype=torch.uint8).to(device)
    comm.broadcast(torch.tensor([data.numel()], device=device))
    comm.broadcast(data)
    if buffer.numel():
        comm.broadcast(buffer)


def hear(comm: Comm, device: torch.device) -> Any:
    """On the others: what the first rank tells."""
    length = torch.zeros(1, dtype=torch.int64, device=device)
    comm.broadcast(length)
    comm.settle()
    data = torch.zeros(int(length), dtype=torch.uint8, device=device)
    comm.broadcast(data)
    header, layout = json.loads(data.cpu().numpy().tobytes())
    buffer = torch.empty(packed_size(layout), dtype=torch.uint8, device=device)
    if buffer.numel():
        comm.broadcast(buffer)
    return decode(header, unpack(buffer, layout), device)
