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
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)  # this folder holds names of others
sys.path.append(str(HERE.parents[1]))

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
        write_files(Path(folder), cpu=options.cpu)
        call = [sys.executable, str(Path(__file__).resolve()), "--folder", folder, *(["--cpu"] if options.cpu else [])]
        with ThreadPoolExecutor(options.jobs or len(names)) as pool:
            rows = [row for found in pool.map(lambda name: outcome([*call, "--case", name], name), names) for row in found]
    heads = {"flags": 20, "mode": 14, "ok": 4, "error": 7, "replays": 7, "first s": 7, "ms/step": 7, "memory MB": 9}
    print("\n" + " ".join(f"{head:{width}}" for head, width in heads.items()) + " notes")
    for row in rows:
        print(" ".join(f"{value:{width}}" for value, width in zip(row, [*heads.values(), 0], strict=False)))
    print(f"{time.time() - started:.0f} s, {sum(row[2] != 'ok' for row in rows)} of {len(rows)} not ok")


def outcome(call: list[str], name: str) -> list[list[str]]:
    """A case's rows of the table; what went wrong is one."""
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1", "TORCHINDUCTOR_COMPILE_THREADS": "3"}
    try:
        done = subprocess.run(
            call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT, env=environment, check=False
        )
        text, code = done.stdout, str(done.returncode)
    except subprocess.TimeoutExpired as late:
        text, code = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or "", "late"
    found = [json.loads(line.partition("ROW ")[2]) for line in text.splitlines() if line.startswith("ROW ")]
    if code != "0" or not found:
        lines = [line for line in text.splitlines() if line.strip() and not line.startswith("ROW ")]
        found.append([name, "-", "FAIL", *["-"] * 5, f"ended with {code}: {(lines or [''])[-1][:150]}"])
    wrong = any(row[2] != "ok" for row in found)
    print("\n".join([f"== {name}", *(text.splitlines()[-60:] if wrong else []), *("  ".join(row) for row in found)]), flush=True)
    return found


def write_files(folder: Path, *, cpu: bool) -> None:
    """A FLUX of 1.1 GB in float32 (8 MB for CPUs)."""
    from env import models
    from safetensors.torch import save_file

    heads, double, single = (1, 1, 1) if cpu else (8, 4, 8)
    save_file(models.flux(seed=51, heads=heads, double_blocks=double, single_blocks=single), folder / "flux.safetensors")


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

    def put(*values: str) -> None:
        print("ROW " + json.dumps([name, *values]), flush=True)

    with torch.inference_mode():
        base = comfy.sd.load_diffusion_model(str(folder / "flux.safetensors"))
        started = time.time()
        sample(base, cpu=cpu)
        first, stock = time.time() - started, sample(base, cpu=cpu)
        what = f"{'cpu' if cpu else torch.cuda.get_allocator_backend()}, {'dynamic' if base.is_dynamic() else 'static'}"
        put("stock", "ok", "0e+00", "-", f"{first:.1f}", f"{pace(base, folder, cpu=cpu):.1f}", memory(cpu), what)
        for mode in MODES:
            try:
                put(mode, *row(case, mode, attach(base, Compile(mode)), stock, folder, cpu=cpu))
            except Exception as error:  # noqa: BLE001  the table says it, the next mode is tried
                traceback.print_exc()
                put(mode, "FAIL", *["-"] * 5, f"{type(error).__name__}: {error}".splitlines()[0][:200])
    sys.stdout.flush()
    os._exit(0)


def row(case: Case, mode: str, model: Any, stock: Any, folder: Path, *, cpu: bool) -> list[str]:
    from parity.inprocess import reports

    with reports() as lines:
        started = time.time()
        sample(model, cpu=cpu)
        first = time.time() - started
        result = sample(model, cpu=cpu)
        step = pace(model, folder, cpu=cpu)
    error = float((result - stock).norm() / stock.norm())
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
    with (folder / "flux.safetensors").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        times = []
        for _ in range(3):
            started = time.perf_counter()
            sample(model, cpu=cpu)
            times.append(time.perf_counter() - started)
    return 1000 * min(times) / STEPS


def memory(cpu: bool) -> str:
    """What torch's allocator has in use between prompts."""
    import torch

    return "-" if cpu else f"{torch.cuda.memory_allocated() / 2**20:.0f}"


def sample(model: Any, *, cpu: bool) -> Any:
    import comfy.sample
    import torch
    from env import models

    make = partial(torch.randn, generator=torch.Generator().manual_seed(5))
    text = [[make(1, 33, models.FLUX_TEXT_WIDTH), {"pooled_output": make(1, models.FLUX_POOLED_WIDTH)}]]
    latent = torch.zeros(1, models.LATENT_CHANNELS, *((18, 22) if cpu else (128, 130)))
    result = comfy.sample.sample(model, make(*latent.shape), STEPS, 1.0, "euler", "simple", text, text, latent, disable_pbar=True, seed=5)
    return result.float().cpu()


if __name__ == "__main__":
    main()
