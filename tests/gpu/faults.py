"""Faults where there is a GPU: two ranks on ONE card, a worker killed, hung or out of memory, cancel, and rank 0's own failures.

    python tests/gpu/faults.py            every case, a table last (about two minutes on one H100 with 16 cores)
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
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)  # this folder holds names of others
sys.path.append(str(HERE.parents[1]))

STEPS = 5
LIMIT = 240  # seconds a case
SILENCE = 4.0  # seconds without a sign of life after which a worker counts as hung
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


@dataclass(frozen=True)
class Fault:
    """``who`` fails ``how`` at a stage: compiling, first (step), capture (or the second step), later (a replay, where there is one)."""

    who: str
    how: str
    stage: str
    outcome: str
    words: str = ""

    @property
    def name(self) -> str:
        return f"{self.who} {self.how}, {self.stage}"


KILLED, HUNG, FULL = "was ended by SIGKILL", f"gave no sign of life for {SILENCE:g} s", "OutOfMemoryError"
WITHOUT = "goes on without CUDA graphs"


def faults(case: Case, *, cuda: bool) -> list[Fault]:
    """Those that the case has: the first one on a group that has computed nothing yet."""
    graph, compiled = case.graph and cuda, "compile" in case.mode and cuda
    stages = ["first", "capture", "later"] if graph else ["first", "later"]
    killed = ["compiling", "capture"] if compiled else stages  # a worker that starts anew also compiles anew
    found = [Fault("worker", "killed", stage, "alone", KILLED) for stage in killed]
    found += [Fault("worker", "stopped", stage, "alone", HUNG) for stage in (stages[-1:] if compiled else stages[-2:])]
    found += [Fault("worker", "memory", stage, "shared" if stage == "capture" else "alone", FULL) for stage in stages]
    found += [Fault("rank 0", "cancelled", stage, "cancelled") for stage in stages]
    found += [Fault("rank 0", "memory", stage, "alone", f"rank 0 failed: {FULL}") for stage in ("first", "later") if not graph]
    if graph:
        found += [Fault("rank 0", how, "capture", "shared", WITHOUT) for how in ("memory", "really full", "refused")]
        found += [Fault("one rank", how, "capture", outcome) for how, outcome in (("cancelled", "cancelled"), ("refused", "shared"))]
    return found


# -- the parent: starts the cases, prints the table -------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="; ".join(CASES))
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--jobs", type=int, help="cases at the same time")
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        inside(options.case, options.folder, cpu=options.cpu, only=options.only, rows=options.rows)
        return
    started, names = time.time(), options.names or (["off", "graph"] if options.cpu else [*CASES])
    with tempfile.TemporaryDirectory(prefix="paradit-gpu-") as folder:
        write_files(Path(folder), cpu=options.cpu)
        call = [sys.executable, str(Path(__file__).resolve()), "--folder", folder, "--only", options.only]
        calls = [[*call, *(["--cpu"] if options.cpu else []), "--case", name] for name in names]
        with ThreadPoolExecutor(options.jobs or (1 if options.cpu else len(names))) as pool:
            rows = [row for found in pool.map(outcome, calls, names) for row in found]
    heads = {"case": 23, "fault": 28, "ok": 4, "outcome": 9, "error": 7, "noticed s": 9, "prompt s": 8, "next s": 6, "MB": 5}
    print("\n" + " ".join(f"{head:{width}}" for head, width in heads.items()) + " notes")
    for row in rows:
        print(" ".join(f"{value:{width}}" for value, width in zip(row, [*heads.values(), 0], strict=False)))
    print(f"{time.time() - started:.0f} s, {sum(row[2] != 'ok' for row in rows)} of {len(rows)} not ok")


def outcome(call: list[str], name: str) -> list[list[str]]:
    """A case's rows of the table; what went wrong is one."""
    environment = {**os.environ, "NCCL_HOSTID": "paradit-rank0", "PYTHONFAULTHANDLER": "1", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    environment["PYTORCH_CUDA_ALLOC_CONF"] = f"backend:{CASES[name].allocator}"
    # both ranks use one card, which NCCL takes for a mistake unless they seem to be on two machines
    with tempfile.TemporaryFile("w+") as file:  # not a pipe: whoever outlives the case would keep it open
        rows = os.dup(1)  # the table comes last, and what is known by then must not be lost with it
        call = [*call, "--rows", str(rows)]
        process = subprocess.Popen(
            call, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True, pass_fds=(rows,)
        )
        os.close(rows)
        try:
            code = str(process.wait(LIMIT))
        except subprocess.TimeoutExpired:
            code = "late"
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        file.seek(0)
        text = file.read()
    found = [json.loads(line.partition("ROW ")[2]) for line in text.splitlines() if line.startswith("ROW ")]
    if code != "0" or not found:
        lines = [line for line in text.splitlines() if line.strip() and not line.startswith("ROW ")]
        found.append([name, "-", "FAIL", f"ended with {code}: {(lines or [''])[-1][:150]}"])
    wrong = code != "0" or any(row[2] != "ok" for row in found)
    print(f"== {name}: ended with {code}" + ("\n" + "\n".join(text.splitlines()[-120:]) if wrong else ""), flush=True)
    return found


def write_files(folder: Path, *, cpu: bool) -> None:
    """A FLUX of 1.1 GB in float32 (30 MB for CPUs)."""
    from env import models
    from safetensors.torch import save_file

    heads, double, single = (2, 1, 1) if cpu else (8, 4, 8)
    save_file(models.flux(seed=51, heads=heads, double_blocks=double, single_blocks=single), folder / "flux.safetensors")


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


def inside(name: str, folder: Path, *, cpu: bool, only: str, rows: int) -> None:
    """``rows``: where each is written at once, beside the log."""
    faulthandler.dump_traceback_later(LIMIT - 10)  # where it hangs, if it does
    case, order = CASES[name], folder / f"{name}.json"
    os.environ["FAULT"] = str(order)
    from env.comfy_import import boot_comfy, dynamic_vram

    boot_comfy(["--cpu"] if cpu else case.flags)
    if not cpu:
        dynamic_vram()
    import comfy.sd
    import torch

    from para_core.comfy import sidecars
    from para_core.group.group import Group

    group = sidecars._group = Group(HERE.parent / "faults" / "faulty_sidecar.py", sidecars._hello)
    group._pool._environment["NCCL_HOSTID"] = "paradit-rank1"
    sidecars.devices = lambda settings, *_: ["cpu" if cpu else "cuda:0"] * (settings.gpus - 1)  # the same card twice
    with torch.inference_mode():
        trial = Trial(case, group, comfy.sd.load_diffusion_model(str(folder / "flux.safetensors")), order, cpu=cpu)
        for fault in faults(case, cuda=not cpu):
            if only and only not in fault.name:
                continue
            print(f"-- {fault.name}", flush=True)
            try:
                row = trial.row(fault)
            except BaseException as error:  # noqa: BLE001  the table says it, the next fault is tried
                traceback.print_exc()
                row = ["FAIL", "-", "-", "-", "-", "-", "-", f"{type(error).__name__}: {error}"[:160]]
            print("ROW " + json.dumps([name, fault.name, *row]), flush=True)
            os.write(rows, "  ".join([name, fault.name, *row, "\n"]).encode())
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
        self.size = base.model_size()
        self.single = attach(base, Compile(case.mode))
        self.shared = attach(self.single, Parallel(2))
        sample(base, cpu=cpu)
        self.stock = sample(base, cpu=cpu)
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
                place, after = self.place(fault.stage)
                how = {"killed": "kill", "stopped": "stop"}.get(fault.how, fault.how)
                self.order.write_text(json.dumps({"rank": 1, "at": place, "after": after, "how": how}))
            else:
                stack.enter_context(self.failing(fault, at))
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

    def place(self, stage: str) -> tuple[str, int]:
        """Where a worker fails, and how often it has passed there before."""
        if self.case.graph and not self.cpu and stage != "first":
            return ("capture", 3) if stage == "capture" else ("replay", 1)
        return "exchange", 3 + self.messages * {"first": 0, "capture": 1, "later": 3}[stage]

    @contextmanager
    def failing(self, fault: Fault, at: list[float]) -> Iterator[None]:
        """Rank 0 fails, or is told to stop, once; ``at`` gets the time."""
        import comfy.model_management
        import torch

        from para_core.execution.graphs import Capture
        from para_core.execution.runner import AttentionOverride

        replay, compute, call, seen = Capture.replay, AttentionOverride.compute, AttentionOverride.__call__, 0
        graph = self.case.graph and not self.cpu

        def fail() -> None:
            at.append(time.time())
            if fault.how == "cancelled":
                comfy.model_management.interrupt_current_processing(True)
            if fault.how == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            if fault.how == "refused":
                torch.cuda.current_stream().synchronize()
            if fault.how == "really full":
                there = torch.cuda.get_device_properties(0).total_memory
                torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**24) / there)

        def passed() -> None:
            nonlocal seen
            now = not graph or torch.cuda.is_current_stream_capturing() == (fault.stage == "capture")
            seen += now
            if now and not at and seen > 2 + (0 if graph else self.calls * {"first": 0, "capture": 1, "later": 3}[fault.stage]):
                fail()

        def replayed(capture: Any, cache: Any) -> None:
            nonlocal seen
            replay(capture, cache)
            seen += 1
            if seen == 2 and fault.stage == "later":
                fail()

        def attending(function: Callable) -> Callable:
            def attended(*args: Any, **kwargs: Any) -> Any:
                if not (graph and fault.stage == "later"):
                    passed()
                return function(*args, **kwargs)

            return attended

        with ExitStack() as stack:
            stack.enter_context(patch.object(Capture, "replay", replayed))
            stack.enter_context(patch.object(AttentionOverride, "__call__", attending(call)))
            stack.enter_context(patch.object(AttentionOverride, "compute", attending(compute)))
            yield
        if fault.how == "really full":
            torch.cuda.set_per_process_memory_fraction(1.0)

    def judge(self, fault: Fault, found: Prompt) -> list[str]:
        """What of the faulty prompt is not as it should be."""
        if fault.outcome == "cancelled":
            return [] if found.cancelled else ["not cancelled"]
        if found.cancelled:
            return ["cancelled"]
        notes, wrong = found.report["notes"], []
        ours = fault.who != "worker" or fault.outcome == "alone"  # what a worker says of its graphs is in its own log
        if fault.outcome == "alone" and not any("computed on one GPU" in note for note in notes):
            wrong.append("nobody noticed")
        if len(notes) != ours or any("\n" in note or (fault.words or WITHOUT) not in note for note in notes):
            wrong.append("other words")
        if relative(found.latent, self.stock) > tolerance(self.cpu):
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
        forwards = 2 if self.case.graph and not self.cpu else STEPS  # that Python sees
        if self.level is None:
            self.messages = counts.pop("_all_to_all") // forwards
            self.calls = counts.total() // forwards
        if report["ranks"] != 2 or report["notes"]:
            wrong.append(f"next prompt: {report['ranks']} ranks, {report['notes']}")
        if self.case.graph and not self.cpu and report["replays"] < STEPS - 1:
            wrong.append(f"next prompt: {report['replays']} replays")
        if relative(found.latent, self.stock) > tolerance(self.cpu):
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
        found.latent = sample(model, cpu=cpu)
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


def sample(model: Any, *, cpu: bool) -> Any:
    import comfy.sample
    import torch
    from env import models

    make = partial(torch.randn, generator=torch.Generator().manual_seed(5))
    text = [[make(1, 33, models.FLUX_TEXT_WIDTH), {"pooled_output": make(1, models.FLUX_POOLED_WIDTH)}]]
    latent = torch.zeros(1, models.LATENT_CHANNELS, *((18, 22) if cpu else (128, 130)))
    result = comfy.sample.sample(model, make(*latent.shape), STEPS, 1.0, "euler", "simple", text, text, latent, disable_pbar=True, seed=5)
    return result.float().cpu()


def relative(latent: Any, expected: Any) -> float:
    error = float((latent - expected).norm() / expected.norm())
    return error if error == error else float("inf")


def tolerance(cpu: bool) -> float:
    return (1e-5 if cpu else 2e-5) * STEPS


if __name__ == "__main__":
    main()
