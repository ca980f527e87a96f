"""Attention alone: every kernel that takes a shape, its error, and what ``auto`` and ``exact`` choose there."""

from __future__ import annotations

import itertools
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from record import Record, Row, memory
from rows import attempt

from para_core.attention.backends import BACKENDS, Backend
from para_core.attention.backends.pytorch import plain
from para_core.attention.choice import Chooser, ChosenKernel, request_of
from para_core.attention.contest import contest, cuda_laps, figures
from para_core.attention.timings import Timings

SHAPES = {
    "FLUX 1024²": (1, 24, 4608, 128),
    "FLUX 2048²": (1, 24, 16896, 128),
    "CogVideoX-5B": (1, 48, 17776, 64),
    "Wan 480p": (1, 40, 32760, 128),
    "Wan 720p": (1, 40, 75600, 128),
}
"""(B, H, S, D) of one call on one GPU."""
SETTINGS = ("auto", "exact")
SPENT, FEWEST = 2000.0, 9  # milliseconds and rounds that count: kernels are timed as the pack does it, and for longer
ROWS = 64  # query rows of each head that are compared with float32


def measure(record: Record, options: Namespace) -> None:
    """Rows of every shape: one a kernel, one a setting."""
    cuda = torch.cuda.is_available()
    for name, shape in SHAPES.items():
        if options.quick or not cuda:
            shape = (1, 2, shape[2] // 100, shape[3])
        ways = [*(backend.name for backend in BACKENDS), *SETTINGS]
        if all(record.find("attention", case=name, way=way, memory=memory()) for way in ways):
            continue
        device = torch.device("cuda" if cuda else "cpu")
        generator = torch.Generator(device).manual_seed(0)
        q, k, v = (torch.randn(shape, generator=generator, device=device).to(torch.bfloat16 if cuda else torch.float32) for _ in range(3))
        admitted = rows_of_kernels(record, name, (q, k, v), options)
        for setting in SETTINGS:
            with attempt(record, "attention", {"case": name, "way": setting, "memory": memory()}, options) as row:
                row.update(choice(setting, (q, k, v), admitted))
        del q, k, v


def rows_of_kernels(record: Record, case: str, qkv: tuple[torch.Tensor, ...], options: Namespace) -> dict[str, float]:
    """Milliseconds by kernel. One that fails, or is not for this machine, says so in its row."""
    request = request_of(qkv[0], qkv[1], None, None)
    picked = torch.linspace(0, qkv[0].shape[2] - 1, min(ROWS, qkv[0].shape[2]), device=qkv[0].device).round().long()
    expected, _ = plain(qkv[0][:, :, picked].float(), qkv[1], qkv[2], mask=None, scale=None)
    found: dict[str, Row] = {}
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    for backend in BACKENDS:
        key = {"case": case, "way": backend.name, "memory": memory()}
        if (record.find("attention", **key) or {}).get("failed"):
            continue  # it ended the process before this one
        with attempt(record, "attention", key, options) as row:
            reason = backend.probe() or backend.refuse(request)
            if reason is not None:
                row["absent"] = reason
                continue
            call = partial(backend.run, *qkv, mask=None, scale=None)
            error = (call()[:, :, picked].float() - expected).norm() / expected.norm()
            row.update({"shape": list(qkv[0].shape), "exact": backend.exact, "error": float(f"{error:.2e}")})
            found[backend.name], calls[backend.name] = row, call
    del expected
    if not calls:
        return {}
    times = contest(calls, laps, spent=0 if options.quick else SPENT, fewest=2 if options.quick else FEWEST)
    best = figures(times)
    operations = 4 * request.heads * request.q_len * request.kv_len * request.head_dim
    for name, row in found.items():
        ms = best[name]
        row.update({"ms": round(ms, 4), "spread_ms": round(max(times[name]) - min(times[name]), 4), "tflops": round(operations / ms / 1e9)})
        record.put("attention", row)
        print(f"attention: {case} {name} {row['ms']} ms", flush=True)
    return {name: row["ms"] for name, row in found.items()}


def laps(turns: Sequence[Callable[[], object]]) -> list[float]:
    """Milliseconds of each, on the device's own clock."""
    if torch.cuda.is_available():
        return cuda_laps(turns, torch.device("cuda"))
    marks = [time.perf_counter()]
    for call in turns:
        call()
        marks.append(time.perf_counter())
    return [(stop - start) * 1e3 for start, stop in itertools.pairwise(marks)]


def choice(setting: str, qkv: tuple[torch.Tensor, ...], ms: dict[str, float]) -> Row:
    """What the pack chooses with an empty memory, how long it measured, and whether a restart chooses alike.

    ``over``: the best admissible kernel's time over that of the chosen one, both as measured here.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.json"
        chooser, seconds = decided(setting, qkv, path)
        chosen = winner(chooser, qkv)
        again, _ = decided(setting, qkv, path)
    exact = {backend.name: backend.exact for backend in BACKENDS}
    allowed = {name: time for name, time in ms.items() if setting == "auto" or exact[name]}
    row: Row = {"chosen": chosen.name, "measured_s": round(seconds, 2), "remembered": winner(again, qkv).name == chosen.name}
    if chosen.name in allowed:
        row.update({"best": min(allowed, key=allowed.__getitem__), "over": round(min(allowed.values()) / ms[chosen.name], 3)})
    table = next(iter(chooser.timings.table.values()), {})
    return row | {"its_ms": {name: round(value, 4) for name, value in table.items()}, "replaced": chooser.replaced}


def decided(setting: str, qkv: tuple[torch.Tensor, ...], path: Path) -> tuple[Chooser, float]:
    """A run's chooser after its first forward, and the seconds that timing kernels took after it."""
    device = qkv[0].device
    timings = Timings(path if device.type == "cuda" else None)
    if device.type == "cuda":
        timings.load(device)
    chooser = Chooser(setting, timings=timings)
    chooser.begin_forward()
    ChosenKernel(chooser).run(*qkv, mask=None, scale=None)
    chooser.end_forward()
    started = time.perf_counter()
    chooser.measure(device)
    return chooser, time.perf_counter() - started


def winner(chooser: Chooser, qkv: tuple[torch.Tensor, ...]) -> Backend:
    """The kernel of the next call."""
    return chooser.decide(qkv[0], qkv[1], None, None, needs_lse=False, low_precision_ok=True).candidates[0]
