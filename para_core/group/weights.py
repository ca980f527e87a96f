"""Raw weights from rank 0 to every other rank: in buckets, by broadcast, with a fingerprint that all ranks must share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..sequence.mesh import Comm
from .codec import pack, unpack

BUCKET = 64 * 2**20  # bytes: large enough for full link speed, small beside any card


def buckets(tensors: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Runs of tensors of about ``BUCKET`` bytes, in the mapping's order; a larger tensor travels alone."""
    bucket: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if bucket and size + tensor.nbytes > BUCKET:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = tensor
        size += tensor.nbytes
    if bucket:
        yield bucket


def manifest(tensors: Mapping[str, torch.Tensor]) -> list[list[list[Any]]]:
    """What ``receive`` must expect: for every bucket its [name, shape, dtype] rows."""
    return [[[name, list(tensor.shape), tensor.dtype] for name, tensor in bucket.items()] for bucket in buckets(tensors)]


def size(expected: list[list[list[Any]]]) -> int:
    """Bytes of the tensors in a manifest."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for bucket in expected for _, shape, dtype in bucket)


def fingerprint(buffer: torch.Tensor) -> int:
    """Sum of a flat uint8 buffer's bytes, read as int64 words where they fit, modulo 2^64."""
    words = buffer[: buffer.numel() // 8 * 8].view(torch.int64)
    return (int(words.sum()) + int(buffer[words.numel() * 8 :].sum())) % 2**64


def share(tensors: Mapping[str, torch.Tensor], comm: Comm, device: torch.device) -> int:
    """Rank 0's side: broadcast every bucket over ``comm``. Returns the fingerprint of everything sent."""
    total = 0
    for bucket in buckets(tensors):
        buffer, _ = pack([tensor.to(device) for tensor in bucket.values()])
        comm.broadcast(buffer)
        total += fingerprint(buffer)
    return total % 2**64


def receive(expected: list[list[list[Any]]], comm: Comm, device: torch.device) -> tuple[dict[str, torch.Tensor], int]:
    """The other ranks' side: the tensors by name, as views of the received buckets, and their fingerprint."""
    tensors: dict[str, torch.Tensor] = {}
    total = 0
    for bucket in expected:
        empty, layout = pack([torch.empty(shape, dtype=dtype, device="meta") for _, shape, dtype in bucket])
        buffer = torch.empty(empty.numel(), dtype=torch.uint8, device=device)
        comm.broadcast(buffer)
        total += fingerprint(buffer)
        tensors.update(zip([name for name, _, _ in bucket], unpack(buffer, layout, device), strict=True))
    return tensors, total % 2**64
