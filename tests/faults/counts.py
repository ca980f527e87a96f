"""What a process holds: its own memory, the card's, and instances of the pack's classes."""

from __future__ import annotations

import ctypes
import functools
import gc
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any


def count() -> dict[str, Any]:
    """``memory``: bytes that are the process's own, after it has given back what it does not use; ``card``; ``objects``: by class."""
    gc.collect()
    for one in gc.get_objects():  # what is kept for sizes that may come again, so many at the most
        if isinstance(one, functools._lru_cache_wrapper) and str(one.__module__).startswith("para_core."):
            if one.cache_parameters()["maxsize"] is not None:
                one.cache_clear()
    found: Counter[str] = Counter()
    for one in gc.get_objects():
        kind = type(one)
        if str(kind.__module__).startswith("para_core."):
            found[kind.__qualname__] += 1
        elif kind.__name__ in ("Tensor", "Parameter"):
            found["Tensor"] += 1
    with suppress(OSError, AttributeError):  # elsewhere than with glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    memory = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
    return {"memory": memory, "card": card(), "objects": dict(found)}


def card() -> tuple[int, int]:
    """Bytes of the card that torch has allocated and reserved in this process; where it uses none, those of its tensors.

    What it only keeps for later is given back first.
    """
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
    storages = [one.untyped_storage() for one in tensors if one.layout == torch.strided]  # others have none
    total = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    return total, total
