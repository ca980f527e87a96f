"""Two, three, four and eight ranks where there is a GPU: every way to spread a step over them gives stock's latents.

    python tests/gpu/ranks.py            every number of ranks, a table last (minutes)
    python tests/gpu/ranks.py --cpu      the same with CPU ranks and a tiny model, to see that the script works
    python tests/gpu/ranks.py NUMBER ... only so many ranks

Where there are fewer cards than ranks, ranks share them and talk over sockets: whether messages of the groups within the group (rows
and columns of a ring x Ulysses mesh, parts of a batch) arrive is seen there, speed is not. Each number is a ComfyUI process of its own,
which samples a FLUX with cfg 3, so that there is a batch to spread. `degrees`: batch x ring x Ulysses.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from math import prod
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)  # this folder holds names of others
sys.path.append(str(HERE.parents[1]))

from gpu import processes  # noqa: E402
from gpu.case import FLUX, available, other_ranks, relative, sample, write_flux  # noqa: E402

STEPS, CFG = 5, 3.0
LIMIT = 400  # seconds a case
MODES = ("off", "graph", "compile+graph")
WAYS = {
    "2": ((1, 1, 2), (1, 2, 1), (2, 1, 1)),
    "3": ((1, 1, 3), (1, 3, 1)),
    "4": ((1, 1, 4), (1, 4, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1)),
    "8": ((1, 1, 8), (1, 4, 2), (2, 2, 2)),
}
HEADS = {"ranks": 7, "degrees": 9, "ok": 4, "mode": 14, "error": 7, "replays": 7, "s": 6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NUMBER", help=", ".join(WAYS))
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--jobs", type=int, help="cases at the same time")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        inside(options.case, options.folder, cpu=options.cpu)
        return
    started, names = time.time(), options.names or [*WAYS]
    with tempfile.TemporaryDirectory(prefix="paradit-gpu-") as folder:
        write_flux(Path(folder), cpu=options.cpu, heads=8)
        call = [sys.executable, str(Path(__file__).resolve()), "--folder", folder, *(["--cpu"] if options.cpu else [])]
        rows = processes.run(call, names, HEADS, limit=LIMIT, jobs=options.jobs or (1 if options.cpu else len(names)))
    sys.exit(bool(processes.table(HEADS, rows, started)))


def inside(name: str, folder: Path, *, cpu: bool) -> None:
    from env.comfy_import import boot_comfy

    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "backend:native"
    boot_comfy(["--cpu"] if cpu else ["--disable-dynamic-vram", "--fp32-unet"])
    import comfy.sd
    import torch

    group = other_ranks(cpu=cpu)
    with torch.inference_mode():
        base = comfy.sd.load_diffusion_model(str(folder / FLUX))
        stock = sample(base, STEPS, big=not cpu, cfg=CFG)
        for mode in MODES[: 1 if cpu else None]:
            for degrees in WAYS[name]:
                words = " x ".join(map(str, degrees))
                try:
                    processes.put(name, words, *row(base, stock, degrees, mode, cpu=cpu))
                except Exception as error:  # noqa: BLE001  the table says it, the next way is tried
                    traceback.print_exc()
                    processes.put(*processes.failed(name, words, HEADS, f"{type(error).__name__}: {error}"))
    group.close()
    sys.stdout.flush()
    os._exit(0)


def row(base: Any, stock: Any, degrees: tuple[int, int, int], mode: str, *, cpu: bool) -> list[str]:
    from parity.inprocess import reports

    from para_core.comfy.attach import attach
    from para_core.settings import Compile, Parallel

    batch, ring, ulysses = degrees
    model = attach(attach(base, Compile(available(mode, cpu=cpu))), Parallel(prod(degrees), batch, ulysses, ring))
    started = time.time()
    with reports() as lines:
        result = sample(model, STEPS, big=not cpu, cfg=CFG)
    report, error = lines[-1], relative(result, stock)
    wrong = [] if error <= (1e-5 if cpu else 2e-5) * STEPS else ["inexact"]
    if tuple(report["degrees"]) != degrees:
        wrong.append(f"degrees {report['degrees']}")
    if bool(report["replays"]) != ("graph" in mode):
        wrong.append("replays")
    values = [mode, f"{error:.0e}", str(report["replays"]), f"{time.time() - started:.1f}", "; ".join([*wrong, *report["notes"]])[:300]]
    return ["FAIL" if wrong or report["notes"] else "ok", *values]


if __name__ == "__main__":
    main()
