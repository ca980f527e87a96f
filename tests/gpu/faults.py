"""Faults where there is a GPU: two ranks on ONE card, a worker killed, hung or out of memory, cancel, and rank 0's own failures.

    python tests/gpu/faults.py            every case, a table last (minutes)
    python tests/gpu/faults.py --cpu      the same with CPU ranks and a tiny model, to see that the script works
    python tests/gpu/faults.py NAME ...   only these cases

Each case is a ComfyUI process of its own, in which one fault follows the other. After each the prompt must have ended as the
table says: `alone` (two ranks until the fault, one from there on, and one sentence), `shared` (nothing lost), or `cancelled`. Its
latents must equal stock's; no CUDA graph and no communicator may be left; and the next prompt has two ranks again, replays
graphs where the mode has them, says nothing, and leaves as much memory in use as before. Cases run at the same time on a GPU.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)  # this folder holds names of others
sys.path.append(str(HERE.parents[1]))

from gpu import failures, processes  # noqa: E402
from gpu.case import FLUX, available, other_ranks, relative, sample, write_flux  # noqa: E402
from gpu.failures import SILENCE, WITHOUT, Fault  # noqa: E402

STEPS = 5
LIMIT = 400  # seconds a case
KEPT = 0.05  # growth of memory in use, in models' sizes, that is none


@dataclass(frozen=True)
class Case:
    mode: str
    flags: tuple[str, ...] = ("--disable-dynamic-vram", "--fp32-unet")
    allocator: str = "native"

    @property
    def graph(self) -> bool:
        return "graph" in self.mode


CASES = {
    "off": Case("off"),
    "graph": Case("graph"),
    "compile+graph": Case("compile+graph"),
    "off, dynamic VRAM": Case("off", flags=("--fp32-unet",), allocator="cudaMallocAsync"),
}
HEADS = {"case": 23, "fault": 28, "ok": 4, "outcome": 9, "error": 7, "noticed s": 9, "prompt s": 8, "next s": 6, "MB": 5}


# -- the parent: starts the cases, prints the table -------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="; ".join(CASES))
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--jobs", type=int, help="cases at the same time")
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        inside(options.case, options.folder, cpu=options.cpu, only=options.only)
        return
    started, names = time.time(), options.names or (["off", "graph"] if options.cpu else [*CASES])
    with tempfile.TemporaryDirectory(prefix="paradit-gpu-") as folder:
        write_flux(Path(folder), cpu=options.cpu, heads=2)
        call = [sys.executable, str(Path(__file__).resolve()), "--folder", folder, "--only", options.only]
        jobs = options.jobs or (1 if options.cpu else len(names))
        rows = processes.run([*call, *(["--cpu"] if options.cpu else [])], names, HEADS, limit=LIMIT, jobs=jobs)
    sys.exit(bool(processes.table(HEADS, rows, started)))


# -- a case: rank 0 ---------------------------------------------------------------------------------------------------------


@dataclass
class Prompt:
    """How a prompt ended. ``warned``: when the first warning was logged (seconds since 1970)."""

    latent: Any = None
    report: dict[str, Any] = field(default_factory=dict)
    warned: float = 0.0
    seconds: float = 0.0
    cancelled: bool = False


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def inside(name: str, folder: Path, *, cpu: bool, only: str) -> None:
    faulthandler.dump_traceback_later(LIMIT - 10)  # where it hangs, if it does
    case, order = CASES[name], folder / f"{name}.json"
    os.environ |= {"FAULT": str(order), "PYTORCH_CUDA_ALLOC_CONF": f"backend:{case.allocator}", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    from env.comfy_import import boot_comfy, dynamic_vram

    boot_comfy(["--cpu"] if cpu else case.flags)
    if not cpu:
        dynamic_vram()
    import comfy.sd
    import torch

    group = other_ranks(HERE.parent / "faults" / "faulty_sidecar.py", cpu=cpu)
    with torch.inference_mode():
        trial = Trial(case, group, comfy.sd.load_diffusion_model(str(folder / FLUX)), order, cpu=cpu)
        for fault in failures.faults(graph=case.graph and not cpu, compiled="compile" in case.mode and not cpu):
            if only and only not in fault.name:
                continue
            print(f"-- {fault.name}", flush=True)
            try:
                processes.put(name, fault.name, *trial.row(fault))
            except BaseException as error:  # noqa: BLE001  the table says it, the next fault is tried
                traceback.print_exc()
                processes.put(*processes.failed(name, fault.name, HEADS, f"{type(error).__name__}: {error}"))
            order.unlink(missing_ok=True)
    group.close()
    sys.stdout.flush()
    os._exit(0)


class Trial:
    """One model, sampled under faults."""

    def __init__(self, case: Case, group: Any, base: Any, order: Path, *, cpu: bool):
        from para_core.comfy.attach import attach
        from para_core.settings import Compile, Parallel

        self.case, self.group, self.order, self.cpu = case, group, order, cpu
        self.graph = case.graph and not cpu
        self.size = base.model_size()
        self.single = attach(base, Compile(available(case.mode, cpu=cpu)))
        self.shared = attach(self.single, Parallel(2))
        sample(base, STEPS, big=not cpu)
        self.stock = sample(base, STEPS, big=not cpu)
        self.messages = self.calls = 0
        """Exchanges and attention calls of a forward, where Python sees each."""
        self.level: int | None = None
        self.communicators = 99  # of a group in use, NCCL's subgroups included

    def row(self, fault: Fault) -> list[str]:
        if self.level is None and fault.stage != "compiling":
            self.calm()
        one = fault.who == "one rank"
        self.group.timeouts.heartbeat = SILENCE if fault.how == "stopped" else 20.0
        at: list[float] = []
        with ExitStack() as stack:
            if fault.stage == "compiling":
                from faults.sampling import at_step

                stack.callback(at_step(self.group, 0, 2.0, lambda: (at.append(time.time()), os.kill(self.group.pids[0], signal.SIGKILL))))
            elif fault.who == "worker":
                written = self.order.with_suffix(".new")  # the worker may look at any time
                written.write_text(json.dumps(failures.order(fault, self.messages, graph=self.graph)))
                written.rename(self.order)
            else:
                stack.enter_context(failures.failing(fault, self.calls, at, graph=self.graph))
            found = run(self.single if one else self.shared, cpu=self.cpu)
        told = self.order.with_name(f"{self.order.name}.at")
        if told.exists():
            at.append(float(told.read_text()))
            told.unlink()
        wrong = [] if at else ["the fault did not happen"]
        wrong += self.judge(fault, found) + self.leftovers()
        after, again = self.calm()
        notes = "; ".join([*wrong, *again, *found.report.get("notes", [])])
        noticed = found.warned - at[0] if at and found.warned else 0.0
        ended = "cancelled" if found.cancelled else "alone" if any("computed on one GPU" in one for one in notes.split(";")) else "shared"
        grown = (self.used() - (self.level or 0)) / 2**20
        error = "-" if found.cancelled else f"{relative(found.latent, self.stock):.0e}"
        times = [f"{noticed:.1f}" if noticed else "-", f"{found.seconds:.1f}", f"{after.seconds:.1f}", f"{grown:.0f}"]
        return ["FAIL" if wrong or again else "ok", ended, error, *times, notes[:400]]

    def judge(self, fault: Fault, found: Prompt) -> list[str]:
        """What of the faulty prompt is not as it should be."""
        if fault.outcome == "cancelled":
            return [] if found.cancelled else ["not cancelled"]
        if found.cancelled:
            return ["cancelled"]
        notes, wrong = found.report["notes"], []
        if fault.outcome == "alone" and not any("computed on one GPU" in note for note in notes):
            wrong.append("nobody noticed")
        if len(notes) != 1 or any("\n" in note or (fault.words or WITHOUT) not in note for note in notes):
            wrong.append("other words")
        if not relative(found.latent, self.stock) <= tolerance(self.cpu):
            wrong.append("inexact")
        return wrong

    def leftovers(self) -> list[str]:
        """CUDA graphs and communicators that outlive their run."""
        import torch

        gc.collect()
        left = 0
        for _ in range(50):
            left = sum(one.name == "paradit-abort" for one in threading.enumerate())
            if left <= self.communicators:
                break
            time.sleep(0.1)
        graphs = sum(type(one) is torch.cuda.CUDAGraph for one in gc.get_objects())
        return [f"{graphs} graphs left"] * bool(graphs) + [f"{left} communicators"] * (left > self.communicators)

    def calm(self) -> tuple[Prompt, list[str]]:
        """A prompt without a fault, and what of it is not as it should be."""
        from para_core.execution.runner import AttentionOverride
        from para_core.group.communicator import Communicator

        self.group.timeouts.heartbeat = 20.0
        counts: Counter[str] = Counter()

        def counted(holder: Any, name: str) -> Any:
            function = getattr(holder, name)

            def counting(*args: Any, **options: Any) -> Any:
                counts[name] += 1
                return function(*args, **options)

            return patch.object(holder, name, counting)

        with counted(Communicator, "_all_to_all"), counted(AttentionOverride, "__call__"), counted(AttentionOverride, "compute"):
            found = run(self.shared, cpu=self.cpu)
        wrong = []
        report = found.report
        forwards = 2 if self.graph else STEPS  # that Python sees
        if self.level is None:
            self.messages = counts.pop("_all_to_all") // forwards
            self.calls = counts.total() // forwards
        if report["ranks"] != 2 or report["notes"]:
            wrong.append(f"next prompt: {report['ranks']} ranks, {report['notes']}")
        if self.graph and report["replays"] < STEPS - 1:
            wrong.append(f"next prompt: {report['replays']} replays")
        if not relative(found.latent, self.stock) <= tolerance(self.cpu):
            wrong.append(f"next prompt: error {relative(found.latent, self.stock):.0e}")
        used = self.used()
        if self.level is None:
            self.level = used
            self.communicators = sum(one.name == "paradit-abort" for one in threading.enumerate())
        if used - self.level > KEPT * self.size:
            wrong.append("memory")
        return found, wrong + self.leftovers()

    def used(self) -> int:
        """Bytes that torch holds on the card, what it only keeps for later given back."""
        import comfy.model_management
        import torch

        if self.cpu:
            return 0
        gc.collect()
        torch.cuda.synchronize()
        comfy.model_management.soft_empty_cache()
        return torch.cuda.memory_reserved() if self.case.allocator == "native" else torch.cuda.memory_allocated()


def run(model: Any, *, cpu: bool) -> Prompt:
    """A prompt, and what was logged about it."""
    from comfy.model_management import InterruptProcessingException, interrupt_current_processing
    from faults.sampling import REPORT

    logger, records, found = logging.getLogger("paradit"), Records(), Prompt()
    logger.setLevel(logging.INFO)
    logger.addHandler(records)
    started = time.time()
    try:
        found.latent = sample(model, STEPS, big=not cpu)
    except InterruptProcessingException:
        found.cancelled = True
    finally:
        interrupt_current_processing(False)
        logger.removeHandler(records)
    found.seconds = time.time() - started
    lines = [record.getMessage() for record in records.records]
    found.report = [json.loads(match.group(1)) for line in lines if (match := REPORT.search(line))][-1]
    found.warned = next((record.created for record in records.records if record.levelno >= logging.WARNING), 0.0)
    print("\n".join(line for line in lines if not REPORT.search(line)), flush=True)
    return found


def tolerance(cpu: bool) -> float:
    return (1e-5 if cpu else 2e-5) * STEPS


if __name__ == "__main__":
    main()
