"""Memory of the card: no growth over prompts of changing sizes, and peaks against stock's.

    python tests/gpu/memory.py            every case, most at the same time, a table last (about 90 seconds on one H100)
    python tests/gpu/memory.py --cpu      the same on the CPU with tiny models and few prompts, to see that the script works
    python tests/gpu/memory.py NAME ...   only these cases

Each case is a process of its own. MB are those that torch has allocated and reserved in it, at the start (after prompts of all
sizes) and at the end; of two ranks on ONE card also what others use of it. Peaks are of live tensors beside the weights, over
stock's, in a prompt after the first; two ranks may need what ComfyUI is told (para_core/execution/memory.py). The model is
FLUX.1-dev with fewer blocks, which changes neither.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)  # this folder holds names of others
sys.path.insert(1, str(HERE.parent / "bench"))
sys.path.append(str(HERE.parents[1]))

LIMIT = 180  # seconds a case
FLAGS = ("--disable-dynamic-vram", "--disable-cuda-malloc", "--bf16-unet")
ALLOCATED, RESERVED = 4, 64  # MB that a process may grow
ABOVE = 1.01  # peaks over stock's


@dataclass(frozen=True)
class Case:
    """``prompts``: with changing sizes (0: peaks are measured). modes: of Compile Blocks. side: of the picture, for peaks."""

    prompts: int = 0
    ranks: int = 1
    modes: tuple[str, ...] = ("off",)
    side: int = 1024


CASES = {
    "growth": Case(100, modes=("compile+graph",)),
    "growth, two ranks": Case(100, ranks=2),
    "peaks": Case(modes=("off", "compile", "graph", "compile+graph")),
    "peaks, two ranks": Case(ranks=2, side=2048),
}
HEADS = {"case": 18, "mode": 14, "ok": 4, "allocated MB": 15, "reserved MB": 15, "others MB": 15, "peak MB": 8, "/stock": 7, "captures": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="; ".join(CASES))
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        inside(options.case, cpu=options.cpu)
        return
    started, names = time.time(), options.names or [*CASES]
    call = [sys.executable, str(Path(__file__).resolve()), *(["--cpu"] if options.cpu else [])]
    rows = []
    alone = [name for name in names if options.cpu or CASES[name].prompts and CASES[name].ranks > 1]  # others' memory counts there
    for some in (*([name] for name in alone), [name for name in names if name not in alone]):
        with ThreadPoolExecutor(max(1, len(some))) as pool:
            rows += [row for found in pool.map(lambda name: outcome([*call, "--case", name], name), some) for row in found]
    print("\n" + " ".join(f"{head:{width}}" for head, width in HEADS.items()) + " notes")
    for row in rows:
        print(" ".join(f"{value:{width}}" for value, width in zip(row, [*HEADS.values(), 0], strict=False)))
    print(f"{time.time() - started:.0f} s, {sum(row[2] != 'ok' for row in rows)} of {len(rows)} not ok")


def outcome(call: list[str], name: str) -> list[list[str]]:
    """A case's rows of the table; what went wrong is one."""
    # both ranks use one card, which NCCL takes for a mistake unless they seem to be on two machines
    environment = {**os.environ, "NCCL_HOSTID": "paradit-rank0", "PYTHONFAULTHANDLER": "1", "TORCHINDUCTOR_COMPILE_THREADS": "3"}
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
        found.append([name, "-", "FAIL", *["-"] * 6, f"ended with {code}: {(lines or [''])[-1][:150]}"])
    wrong = any(row[2] != "ok" for row in found)
    print("\n".join([f"== {name}", *(text.splitlines()[-60:] if wrong else []), *("  ".join(row) for row in found)]), flush=True)
    return found


def inside(name: str, *, cpu: bool) -> None:
    case = CASES[name]
    from env.comfy_import import boot_comfy, initialise_memory

    boot_comfy(["--cpu"] if cpu else FLAGS)
    if not cpu:
        initialise_memory()
    import cases
    import torch
    from sizes import CASES as SIZES
    from sizes import tiny

    from para_core.comfy import sidecars

    sidecars.devices = lambda settings, *_: ["cpu" if cpu else "cuda:0"] * (settings.gpus - 1)  # the same card twice
    group = sidecars.group()
    group._pool._environment["NCCL_HOSTID"] = "paradit-rank1"
    size = SIZES["flux-1024"]
    size = tiny(size) if cpu else replace(size, config={**size.config, "depth": 2, "depth_single_blocks": 4}, text=(256, 4096))
    with torch.inference_mode():
        model = cases.build(size)
        rows = growth(model, size, case, cpu=cpu) if case.prompts else peaks(model, size, case, cpu=cpu)
        try:
            for row in rows:
                print("ROW " + json.dumps([name, *row]), flush=True)
        except Exception as error:  # noqa: BLE001  the table says it
            traceback.print_exc()
            print("ROW " + json.dumps([name, "-", "FAIL", *["-"] * 6, f"{type(error).__name__}: {error}".splitlines()[0][:200]]))
    group.close()
    sys.stdout.flush()
    os._exit(0)


def settings(model: Any, case: Case, mode: str) -> Any:
    from para_core.comfy.attach import attach
    from para_core.settings import Attention, Compile, Parallel

    model = attach(attach(model, Attention("exact")), Compile(mode))
    return attach(model, Parallel(case.ranks, ulysses_degree=case.ranks)) if case.ranks > 1 else model


def growth(model: Any, size: Any, case: Case, *, cpu: bool):
    """A row for many prompts of changing sizes."""
    import cases

    from para_core.execution.graphs import LIMIT as MOST

    (mode,) = case.modes
    model, dice, captures, notes = settings(model, case, mode), random.Random(3), watch_captures(), set()

    def prompt(height: int, width: int) -> None:
        report = cases.sample(model, replace(size, latent=(1, 16, height, width)), steps=3).report
        notes.update(report["notes"])
        if report["ranks"] != case.ranks:
            notes.add(f"{report['ranks']} ranks")

    sides = [8, 10, 12] if cpu else [48, 56, 64, 72, 80, 96]
    for side in sides:
        prompt(side, side)
    start = used(cpu)
    for _ in range(6 if cpu else case.prompts):
        prompt(dice.choice(sides), dice.choice(sides))
    end = used(cpu)
    grown = [after - before for before, after in zip(start, end, strict=True)]
    good = grown[0] <= ALLOCATED and grown[1] <= RESERVED and (case.ranks == 1 or grown[2] <= RESERVED)
    good = good and max(captures) <= MOST and not notes
    if "graph" in mode and not cpu:
        good = good and max(captures) > 0
    spans = [f"{before:.0f} -> {after:.0f}" for before, after in zip(start, end, strict=True)]
    yield [mode, "ok" if good else "FAIL", *spans, "-", "-", str(max(captures)), "; ".join(sorted(notes))[:220]]


def peaks(model: Any, size: Any, case: Case, *, cpu: bool):
    """A row for stock, and one for each mode."""
    import cases

    from para_core.execution.memory import part
    from para_core.plans import plan_for
    from para_core.sequence.mesh import Degrees

    side = 8 if cpu else case.side // 8
    size = replace(size, latent=(1, 16, side, side))
    diffusion = model.model.diffusion_model
    told = part(Degrees(ulysses=case.ranks), side // 2, diffusion.num_heads, plan_for(diffusion).held_outside(diffusion))
    stock, _ = peak(lambda: cases.sample(model, size, steps=4), cpu)
    yield ["stock", "ok", "-", "-", "-", f"{stock:.0f}", "1", "-", ""]
    for mode in case.modes:
        captures = watch_captures()
        accelerated = settings(model, case, mode)
        most, run = peak(lambda accelerated=accelerated: cases.sample(accelerated, size, steps=4), cpu)
        ratio, allowed = (most / stock if stock else 0.0), ABOVE if case.ranks == 1 else told
        good = ratio <= allowed and run.report["ranks"] == case.ranks and not run.report["notes"]
        words = [f"at most {allowed:.2f}", *run.report["notes"]]
        yield [mode, "ok" if good else "FAIL", "-", "-", "-", f"{most:.0f}", f"{ratio:.3f}", str(max(captures)), "; ".join(words)[:220]]


def peak(sample: Any, cpu: bool) -> tuple[float, Any]:
    """MB that live at once beside what lived before, in the second of two prompts, and what it returned."""
    import torch

    sample()
    before = used(cpu)[0]
    if not cpu:
        torch.cuda.reset_peak_memory_stats()
    result = sample()
    return (0.0 if cpu else torch.cuda.max_memory_allocated() / 2**20 - before), result


def used(cpu: bool) -> tuple[float, float, float]:
    """MB that torch has allocated and reserved in this process, and what else is used of the card."""
    import comfy.model_management
    import torch

    gc.collect()
    if cpu:
        return 0.0, 0.0, 0.0
    torch.cuda.synchronize()
    comfy.model_management.soft_empty_cache(force=True)
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    return torch.cuda.memory_allocated() / 2**20, reserved / 2**20, (total - free - reserved) / 2**20


def watch_captures() -> list[int]:
    """Numbers of captures that live after each forward; the list grows."""
    from para_core.execution.graphs import Graphs

    run, found = Graphs.run, [0]

    def counted(self, *args, **kwargs):
        result = run(self, *args, **kwargs)
        found.append(len(self.captures))
        return result

    Graphs.run = counted
    return found


if __name__ == "__main__":
    main()
