"""Programs of several ranks, each in a process of its own, over real gloo (or NCCL, where a test asks for CUDA)."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parents[3])

# The server imports torch once; every rank is a fork of it, made before any thread or collective exists.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["torch", "torch.distributed"])


def run_ranks(program: Callable[..., Any], size: int, *arguments: Any, limit_s: float = 40.0) -> list[Any]:
    """Run ``program(rank, size, *arguments)`` on each rank. Returns each rank's result, None for one that was killed.

    Fails the test with the ranks' tracebacks, and if they need more than ``limit_s``.
    """
    pipes = [_processes.Pipe(duplex=False) for _ in range(size)]
    processes = [
        _processes.Process(target=_rank, args=(program, rank, size, pipes[rank][1], arguments), daemon=True) for rank in range(size)
    ]
    for process, (_, theirs) in zip(processes, pipes, strict=True):
        process.start()
        theirs.close()
    results: dict[int, Any] = {}
    readers = {ours: rank for rank, (ours, _) in enumerate(pipes)}
    deadline = time.monotonic() + limit_s
    try:
        while readers:
            ready = wait(list(readers), timeout=max(0, deadline - time.monotonic()))
            assert ready, f"ranks {sorted(readers.values())} did not end within {limit_s:g} s; the others: {results}"
            for reader in ready:
                rank = readers.pop(reader)
                try:
                    results[rank] = reader.recv()
                except EOFError:
                    results[rank] = (True, None)
    finally:
        for process in processes:
            process.kill()
            process.join()
    failed = [f"rank {rank}:\n{outcome}" for rank, (passed, outcome) in sorted(results.items()) if not passed]
    assert not failed, "\n".join(failed)
    return [results[rank][1] for rank in range(size)]


def _rank(program: Callable[..., Any], rank: int, size: int, results: Connection, arguments: tuple[Any, ...]) -> None:
    if ROOT not in sys.path:
        sys.path.append(ROOT)
    import torch

    torch.set_num_threads(1)
    try:
        outcome = (True, program(rank, size, *arguments))
    except BaseException:  # noqa: BLE001 (pytest's failures are BaseExceptions)
        outcome = (False, traceback.format_exc())
    results.send(outcome)
    # A program may leave collectives pending on purpose; an ordinary exit would wait for them.
    os._exit(0)
