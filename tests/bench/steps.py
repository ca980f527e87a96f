"""Seconds per sampling step of whole models, through the same session code that the nodes use."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import cases
import comfy.memory_management
import torch
from cases import Run
from comfy.model_patcher import ModelPatcher
from record import Record, Row, memory
from rows import attempt
from sizes import CASES, Case, tiny

from para_core.comfy.attach import attach
from para_core.settings import Accelerate, Attention, Compile, Parallel

DEFAULTS = "defaults"
"""The case of FLUX 1024² under ComfyUI's own defaults: loaded from its file, dynamic VRAM on."""


def ranks() -> list[int]:
    """Counts of ranks beside one."""
    return [count for count in (2, 4, 8) if count <= torch.cuda.device_count()] if torch.cuda.is_available() else [2]


def sized(case: Case, options: Namespace) -> Case:
    return tiny(case) if options.quick or not torch.cuda.is_available() else case


def measure(record: Record, name: str, options: Namespace, folder: Path) -> None:
    """Rows of one case: stock first, then every way; those that are in ``record`` already are left out."""
    defaults = name == DEFAULTS
    own = "flux-1024" if defaults else name
    case = sized(CASES[own], options)
    ways = accelerated() if defaults else named(options)
    missing = [way for way in ways if record.find("steps", case=name, way=way, memory=memory()) is None]
    if not missing:
        return
    filed = defaults or comfy.memory_management.aimdo_enabled
    model = cases.from_file(own, case, folder) if filed else cases.build(case)
    reference: list[torch.Tensor] = []
    if "stock" not in missing:
        reference.append(cases.sample(model, case).latents)
    for way in missing:
        with attempt(record, "steps", {"case": name, "way": way, "memory": memory()}, options) as row:
            row.update(one(ways[way](model), case, reference))
            stock = row if way == "stock" else record.find("steps", case=name, way="stock", memory=memory())
            row["over_stock"] = round(stock["step_ms"] / row["step_ms"], 3) if stock and "step_ms" in stock else None


def named(options: Namespace) -> dict[str, Callable[[ModelPatcher], ModelPatcher]]:
    """Stock, then every backend and mode on every count of ranks."""
    found: dict[str, Callable[[ModelPatcher], ModelPatcher]] = {"stock": lambda model: model}
    for backend in options.backends.split(","):
        for mode in options.modes.split(","):
            found[f"1 rank, {backend}, {mode}"] = lambda model, b=backend, m=mode: attach(attach(model, Attention(b)), Compile(m))
            for count in ranks():
                found[f"{count} ranks, {backend}, {mode}"] = lambda model, b=backend, m=mode, n=count: attach(
                    attach(attach(model, Attention(b)), Compile(m)), Parallel(gpus=n)
                )
    return found


def accelerated() -> dict[str, Callable[[ModelPatcher], ModelPatcher]]:
    """Stock, and what Accelerate Sampling makes of it without a cache."""
    found: dict[str, Callable[[ModelPatcher], ModelPatcher]] = {"stock": lambda model: model}
    for count in (1, *ranks()):
        found[f"Accelerate, {count} ranks" if count > 1 else "Accelerate, 1 rank"] = lambda model, n=count: attach(
            model, Accelerate(gpus=n, cache="off")
        )
    return found


def one(model: ModelPatcher, case: Case, reference: list[torch.Tensor]) -> Row:
    """A way's numbers. ``reference``: stock's latents, or to be filled with these."""
    run = cases.sample(model, case)
    if not reference:
        reference.append(run.latents)
    error = float((run.latents - reference[0]).norm() / reference[0].norm())
    return {
        "step_ms": round(run.step * 1e3, 2),
        "spread_ms": round((max(run.seconds) - min(run.seconds)) * 1e3, 2),
        "steps": len(run.seconds),
        "launch_ms": round(run.launch * 1e3, 2),
        "error": float(f"{error:.2e}"),
        "peak_gib": round(run.peak / 2**30, 2) if run.peak else None,
        **({"disturbed": run.disturbed} if run.disturbed else {}),
        **said(run),
    }


def said(run: Run) -> Row:
    """What the run's own report adds: kernels by use, replays of graphs, the exchange's share, and why something was not done."""
    report = run.report
    if not report:
        return {}
    kernels = sorted({name for name, _, _ in report["kernels"]})
    found: Row = {"kernels": ", ".join(kernels), "replays": report["replays"], "ranks": report["ranks"]}
    if report["opening"]:
        found["opening_s"] = report["opening"]
    if report["exchange"]:
        found["exchange_share"] = report["exchange"]["share"]
    return found | ({"notes": report["notes"]} if report["notes"] else {})
