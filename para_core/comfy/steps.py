"""What the cache shall do in a step, on its way from rank 0 to the others as plain data."""

from __future__ import annotations

from typing import Any

from ..cache.first_block import Chunk, Step


def told(step: Step | None) -> dict[str, Any] | None:
    """For the channel; the window is left out, because rank 0 decides."""
    if step is None:
        return None
    plain = {name: value for name, value in vars(step).items() if name != "window"}
    return {**plain, "sigma": float(step.sigma), "chunks": [[chunk.key, chunk.index, chunk.start, chunk.stop] for chunk in step.chunks]}


def heard(data: dict[str, Any] | None) -> Step | None:
    """Put together again what was ``told``."""
    return None if data is None else Step(**{**data, "chunks": tuple(Chunk(*chunk) for chunk in data["chunks"])})
