"""Compiled blocks and CUDA graphs under every way that ComfyUI manages memory: what runs, what is said, what it brings.

    python tests/gpu/modes.py            every set of flags at the same time, a table last (about two minutes on one H100)
    python tests/gpu/modes.py --cpu      the same on the CPU with a tiny model, to see that the script works
    python tests/gpu/modes.py NAME ...   only these sets of flags

CUDA graphs are for torch's own allocator; otherwise one sentence must name the flag that is missing. Where dynamic VRAM is on,
what compiles or captures takes a copy of the model whose weights stay.
Each set of flags is a process of its own that does about memory what ComfyUI's main.py does, and samples stock and in every
mode on one GPU. Milliseconds are those of a prompt's wall time a step, the best of three prompts, of which one at a time runs;
other processes may be compiling meanwhile. `first s` is the first prompt of a mode, in which it compiles and captures.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)  # this folder holds names of others
sys.path.append(str(HERE.parents[1]))

from gpu import processes  # noqa: E402
from gpu.case import FLUX, relative, sample, write_flux  # noqa: E402

STEPS = 8
LIMIT = 240  # seconds a case
MODES = ("off", "compile", "graph", "compile+graph")
TOLERANCE = 5e-2  # relative, bfloat16: another order of rounding, well below what a wrong block does


@dataclass(frozen=True)
class Case:
    """``graphs``: whether prompts replay CUDA graphs where the mode asks for them; otherwise they must say why not."""

    flags: tuple[str, ...]
    graphs: bool = False


CASES = {
    "default": Case(()),
    "native": Case(("--disable-cuda-malloc",), graphs=True),
    "static": Case(("--disable-dynamic-vram",)),
    "static, native": Case(("--disable-dynamic-vram", "--disable-cuda-malloc"), graphs=True),
}
HEADS = {"flags": 20, "mode": 14, "ok": 4, "error": 7, "replays": 7, "first s": 7, "ms/step": 7, "memory MB": 9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="; ".join(CASES))
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--jobs", type=int, help="cases at the same time")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        inside(options.case, options.folder, cpu=options.cpu)
        return
    started, names = time.time(), options.names or (["default"] if options.cpu else [*CASES])
    with tempfile.TemporaryDirectory(prefix="paradit-gpu-") as folder:
        write_flux(Path(folder), cpu=options.cpu)
        call = [sys.executable, str(Path(__file__).resolve()), "--folder", folder, *(["--cpu"] if options.cpu else [])]
        rows = processes.run(call, names, HEADS, limit=LIMIT, jobs=options.jobs or len(names))
    sys.exit(bool(processes.table(HEADS, rows, started)))


def inside(name: str, folder: Path, *, cpu: bool) -> None:
    case = CASES[name]
    from env.comfy_import import boot_comfy, initialise_memory

    boot_comfy(["--cpu"] if cpu else [*case.flags, "--bf16-unet"])
    if not cpu:
        initialise_memory()
    import comfy.sd
    import torch

    from para_core.comfy.attach import attach
    from para_core.settings import Compile

    with torch.inference_mode():
        base = comfy.sd.load_diffusion_model(str(folder / FLUX))
        started = time.time()
        sample(base, STEPS, big=not cpu)
        first, stock = time.time() - started, sample(base, STEPS, big=not cpu)
        what = f"{'cpu' if cpu else torch.cuda.get_allocator_backend()}, {'dynamic' if base.is_dynamic() else 'static'}"
        processes.put(name, "stock", "ok", "0e+00", "-", f"{first:.1f}", f"{pace(base, folder, cpu=cpu):.1f}", memory(cpu), what)
        for mode in MODES:
            try:
                processes.put(name, mode, *row(case, mode, attach(base, Compile(mode)), stock, folder, cpu=cpu))
            except Exception as error:  # noqa: BLE001  the table says it, the next mode is tried
                traceback.print_exc()
                processes.put(*processes.failed(name, mode, HEADS, f"{type(error).__name__}: {error}"))
    sys.stdout.flush()
    os._exit(0)


def row(case: Case, mode: str, model: Any, stock: Any, folder: Path, *, cpu: bool) -> list[str]:
    from parity.inprocess import reports

    with reports() as lines:
        started = time.time()
        sample(model, STEPS, big=not cpu)
        first = time.time() - started
        result = sample(model, STEPS, big=not cpu)
        step = pace(model, folder, cpu=cpu)
    error = relative(result, stock)
    # nothing of ours runs in mode off, and no run is reported
    replays, notes = (lines[-1]["replays"], lines[-1]["notes"]) if lines else (0, [])
    wrong = []
    if not error <= (1e-5 * STEPS if cpu else TOLERANCE):
        wrong.append("inexact")
    if not cpu and "graph" in mode and bool(replays) != case.graphs:
        wrong.append("graphs" if replays else "no graphs")
    if not cpu and len(notes) != ("graph" in mode and not case.graphs):
        wrong.append("other words")
    values = [f"{error:.0e}", str(replays), f"{first:.1f}", f"{step:.1f}", memory(cpu), "; ".join([*wrong, *notes])[:300]]
    return ["FAIL" if wrong else "ok", *values]


def pace(model: Any, folder: Path, *, cpu: bool) -> float:
    """Milliseconds a step."""
    with (folder / FLUX).open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        times = []
        for _ in range(3):
            started = time.perf_counter()
            sample(model, STEPS, big=not cpu)
            times.append(time.perf_counter() - started)
    return 1000 * min(times) / STEPS


def memory(cpu: bool) -> str:
    """What torch's allocator has in use between prompts."""
    import torch

    return "-" if cpu else f"{torch.cuda.memory_allocated() / 2**20:.0f}"


if __name__ == "__main__":
    main()
