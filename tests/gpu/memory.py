"""Memory of the card: no growth over prompts of changing sizes, and peaks against stock's.

    python tests/gpu/memory.py            every case at the same time, a table last (about 90 seconds on one H100)
    python tests/gpu/memory.py --cpu      the same on the CPU with tiny models and few prompts, to see that the script works
    python tests/gpu/memory.py NAME ...   only these cases

Each case is a process of its own. MB are those that torch has allocated and reserved in it, and in the second rank where there
is one (on the same card), at the start (after prompts of all sizes) and at the end; no rank may have more communicators then, of
whose buffers torch does not know. What other processes use of the card does not matter. Peaks are of live tensors beside the
weights, over stock's, in a prompt after the first; two ranks may need what ComfyUI is told (para_core/execution/memory.py). The
model is FLUX.1-dev with fewer blocks, which changes neither. On the CPU MB are those of all tensors, and peaks are not known.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)  # this folder holds names of others
sys.path.insert(1, str(HERE.parent / "bench"))
sys.path.append(str(HERE.parents[1]))

from gpu import processes  # noqa: E402
from gpu.case import available, other_ranks  # noqa: E402

LIMIT = 180  # seconds a case
FLAGS = ("--disable-dynamic-vram", "--disable-cuda-malloc", "--bf16-unet")
ALLOCATED, RESERVED = 4, 64  # MB that a process may grow
ABOVE = 1.01  # peaks over stock's
ANSWER = 30.0  # seconds in which a second rank has ended its run


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
HEADS = {"case": 18, "mode": 14, "ok": 4, "rank 0 MB": 24, "rank 1 MB": 24, "peak MB": 8, "/stock": 7, "captures": 8}


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
    rows = processes.run(call, names, HEADS, limit=LIMIT, jobs=1 if options.cpu else len(names))
    sys.exit(bool(processes.table(HEADS, rows, started)))


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

    size = SIZES["flux-1024"]
    size = tiny(size) if cpu else replace(size, config={**size.config, "depth": 2, "depth_single_blocks": 4}, text=(256, 4096))
    with torch.inference_mode(), tempfile.TemporaryDirectory(prefix="paradit-gpu-") as folder:
        os.environ["COUNTS"] = f"{folder}/counts"
        group = other_ranks(HERE.parent / "faults" / "counting_sidecar.py", cpu=cpu)
        model = cases.build(size)
        rows = growth(model, size, case, cpu=cpu) if case.prompts else peaks(model, size, case, cpu=cpu)
        try:
            for row in rows:
                processes.put(name, *row)
        except Exception as error:  # noqa: BLE001  the table says it
            traceback.print_exc()
            processes.put(*processes.failed(name, "-", HEADS, f"{type(error).__name__}: {error}"))
        group.close()
    sys.stdout.flush()
    os._exit(0)


def settings(model: Any, case: Case, mode: str, *, cpu: bool) -> Any:
    from para_core.comfy.attach import attach
    from para_core.settings import Attention, Compile, Parallel

    model = attach(attach(model, Attention("exact")), Compile(available(mode, cpu=cpu)))
    return attach(model, Parallel(case.ranks, ulysses_degree=case.ranks)) if case.ranks > 1 else model


def growth(model: Any, size: Any, case: Case, *, cpu: bool):
    """A row for many prompts of changing sizes."""
    import cases

    from para_core.execution.graphs import LIMIT as MOST

    (mode,) = case.modes
    model, dice, captures, notes = settings(model, case, mode, cpu=cpu), random.Random(3), watch_captures(), set()

    def prompt(height: int, width: int) -> None:
        report = cases.sample(model, replace(size, latent=(1, 16, height, width)), steps=3).report
        notes.update(report["notes"])
        if report["ranks"] != case.ranks:
            notes.add(f"{report['ranks']} ranks")

    sides = [8, 10, 12] if cpu else [48, 56, 64, 72, 80, 96]
    for side in sides:
        prompt(side, side)
    start = held(lambda: prompt(sides[0], sides[0]), case.ranks)
    for _ in range(6 if cpu else case.prompts):
        prompt(dice.choice(sides), dice.choice(sides))
    end = held(lambda: prompt(sides[0], sides[0]), case.ranks)
    for rank, (before, after) in enumerate(zip(start, end, strict=True)):
        if after.allocated > before.allocated + ALLOCATED or after.reserved > before.reserved + RESERVED:
            notes.add(f"rank {rank} has grown")
        if after.communicators > before.communicators:
            notes.add(f"rank {rank} has {after.communicators} communicators after {before.communicators}")
    good = not notes and max(captures) <= MOST and (max(captures) > 0 or cpu or "graph" not in mode)
    spans = [f"{before} -> {after}" for before, after in zip(start, end, strict=True)] + ["-"] * (2 - case.ranks)
    yield [mode, "ok" if good else "FAIL", *spans, "-", "-", str(max(captures)), "; ".join(sorted(notes))[:220]]


@dataclass(frozen=True)
class Held:
    """By one rank: MB that torch has allocated and reserved, and communicators."""

    allocated: float
    reserved: float
    communicators: int

    def __str__(self) -> str:
        return f"{self.allocated:.0f}, {self.reserved:.0f}"


def held(prompt: Callable[[], None], ranks: int) -> list[Held]:
    """What each rank holds after a prompt."""
    from faults.counts import card

    from para_core.group.communicator import Communicator

    told = Path(os.environ["COUNTS"])
    told.write_text("")  # the second rank writes there when its run has ended
    prompt()
    own = [amount / 2**20 for amount in card()]
    found = [Held(*own, sum(type(one) is Communicator for one in gc.get_objects()))]
    late = time.monotonic() + ANSWER
    while ranks > 1 and not told.stat().st_size:
        if time.monotonic() > late:
            raise TimeoutError("the second rank does not say what it holds")
        time.sleep(0.05)
    if ranks > 1:
        other = json.loads(told.read_text())
        found.append(Held(*(amount / 2**20 for amount in other["card"]), other["objects"].get("Communicator", 0)))
    return found


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
    yield ["stock", "ok", "-", "-", f"{stock:.0f}", "1", "-", ""]
    for mode in case.modes:
        captures = watch_captures()
        accelerated = settings(model, case, mode, cpu=cpu)
        most, run = peak(lambda accelerated=accelerated: cases.sample(accelerated, size, steps=4), cpu)
        ratio, allowed = (most / stock if stock else 0.0), ABOVE if case.ranks == 1 else told
        good = ratio <= allowed and run.report["ranks"] == case.ranks and not run.report["notes"]
        words = [f"at most {allowed:.2f}", *run.report["notes"]]
        yield [mode, "ok" if good else "FAIL", "-", "-", f"{most:.0f}", f"{ratio:.3f}", str(max(captures)), "; ".join(words)[:220]]


def peak(sample: Any, cpu: bool) -> tuple[float, Any]:
    """MB that live at once beside what lived before, in the second of two prompts, and what it returned."""
    import torch
    from faults.counts import card

    sample()
    before = card()[0]
    if not cpu:
        torch.cuda.reset_peak_memory_stats()
    result = sample()
    return (0.0 if cpu else (torch.cuda.max_memory_allocated() - before) / 2**20), result


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
