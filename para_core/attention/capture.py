"""Whether a kernel can be part of a CUDA graph: tried once, because one that cannot may not say so.

SageAttention 2.2 launches on the device's default stream instead of torch's current one. A capture then goes through
without an error and without the kernel, and every replay leaves garbage where attention should be.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from ..log import log
from .backends import Backend
from .backends.base import first_line

ROWS, HEADS = 256, 2


def is_captured(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Capture a small call, replay it on other numbers, and compare with the kernel itself. Waits for the device."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, ROWS, head_dim, device=device, generator=generator).to(dtype) for _ in range(3))
    graph, pool, stream = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
    try:
        backend.run(q, k, v, mask=None, scale=None)
        torch.cuda.synchronize(device)
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                out = backend.run(q, k, v, mask=None, scale=None)
                graph.capture_end()
            except BaseException:
                abandon(graph, pool)
                raise
        v.copy_(torch.randn(v.shape, device=device, generator=generator))
        expected = backend.run(q, k, v, mask=None, scale=None)
        out.zero_()
        graph.replay()
        torch.cuda.synchronize(device)
    except Exception as error:  # noqa: BLE001  kernels of others raise anything; one that cannot run at all shows at the call itself
        log.info("attention backend %s cannot be captured: %s", backend.name, first_line(error))
        return False
    return bool(torch.linalg.vector_norm(out.float() - expected.float()) <= 1e-2 * torch.linalg.vector_norm(expected.float()))


def abandon(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """End a capture that failed; ``pool``: what it was begun with.

    One that CUDA has called off cannot be ended through torch, whose allocator would take the process to be in the middle of
    a capture from then on, and not free memory any more. There is no public way to tell it.
    """
    try:
        graph.capture_end()
    except RuntimeError:
        memory = torch.cuda.memory
        end = getattr(memory, "_cuda_endAllocateToPool", None) or getattr(memory, "_cuda_endAllocateCurrentStreamToPool", None)  # < 2.8
        with suppress(RuntimeError):  # nor will it hear of what has ended
            if end is not None:
                end(torch.cuda.current_device(), pool)
            memory._cuda_releasePool(torch.cuda.current_device(), pool)
