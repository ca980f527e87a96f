"""What ParaDiT costs and saves, measured against stock ComfyUI in one run on one machine.

    python bench.py overhead     hooks and step header on a 30-block model; bytes exchanged
    python bench.py steps        seconds per step of real-size models with random weights (CUDA), tiny ones without CUDA
    python bench.py peers        the same of diffusers and cache-dit, where they are installed
    python bench.py attention    every kernel on the shapes of these models, and what is chosen there
    python bench.py cache        a step with a cache that never hits against one without; a cached step against a full one
    python bench.py profile      where the time of a step goes: kernels by what they are for
    python bench.py share        one rank's part of a step of several, on one card; messages only take the time of a link
    python bench.py group        start of a group of two ranks, and the model's way to the second one
    python bench.py report       writes the tables of RESULTS.md and the README's bars from the records
    python bench.py quality      pictures of every way of saving work beside those of the uncached run (see quality.py);
                                 writes records/quality.json, quality.png and its part of RESULTS.md

Several can be named; none means all that measure but quality. Each case runs in a process of its own, with memory set up as ComfyUI's main
program does it. Several calls with the same ``--turns FOLDER`` may run at once: what they time has the machine to itself. Every row
is written as soon as it is there, to a JSON record (hardware, versions, date, commit) in the folder ``--out``; a call that was cut off
goes on with ``--resume RECORD``. A row that fails says why, and the rest goes on.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [path for path in (str(HERE.parents[1]), str(HERE.parent)) if path not in sys.path]

import pages  # noqa: E402
import turns  # noqa: E402
from env import comfy_import  # noqa: E402
from record import RECORDS, Record, Stale, machine  # noqa: E402

COMMANDS = ("overhead", "attention", "group", "steps", "peers", "cache", "profile", "share")
BY_MODEL = ("steps", "peers", "profile", "share")
ALONE = ("overhead", "attention", "cache")  # under --turns from beginning to end; others ask for their turns
MODELS = "flux-1024,flux-2048,wan-480p,defaults"
ATTEMPTS = 6  # processes that one part may end
STALE = 3  # exit status of a part that may not add to the record


def main() -> int:
    options = arguments()
    if options.what == ["report"]:
        pages.write()
        return 0
    if options.what == ["quality"]:
        import quality

        comfy_import.boot_comfy(["--cpu" if options.cpu else "--disable-dynamic-vram"])
        quality.main(options, machine(options.commit))
        return 0
    return part(options) if options.part else measure(options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*COMMANDS, "report", "quality"]
    parser.add_argument(
        "what", nargs="*", choices=[*names, []], metavar="COMMAND", help=f"of {', '.join(names)}; default: all that measure but quality"
    )
    parser.add_argument("--quick", action="store_true", help="few repeats and tiny models: only shows that the command works")
    parser.add_argument("--cpu", action="store_true", help="without CUDA, where there is a card")
    parser.add_argument("--models", help=f"for steps, peers, profile and share: which, separated by commas ({MODELS})")
    parser.add_argument("--backends", help="for steps, profile and share: attention backends (exact,auto)")
    parser.add_argument("--modes", help="for steps, cache, profile and share: how blocks run (off,compile+graph)")
    parser.add_argument("--ranks", default="2,4,8", help="for share: how many there are to be (2,4,8)")
    parser.add_argument("--out", type=Path, help="folder for the JSON record (default: records/, a temporary one with --quick)")
    parser.add_argument("--resume", type=Path, metavar="RECORD", help="leave out the rows of this record, and write it with the others")
    parser.add_argument("--commit", default="", help="what is measured, where git cannot tell")
    parser.add_argument("--traces", action="store_true", help="for profile: every kernel, in files beside the record")
    parser.add_argument("--turns", type=Path, metavar="FOLDER", help="other calls run, whose models fit on the card too: see turns.py")
    parser.add_argument("--minutes", type=float, default=9, help="begin no row after so many")
    parser.add_argument("--row-limit", type=float, default=280, help="seconds after which a row counts as hung")
    parser.add_argument("--dynamic-vram", action="store_true", help="ComfyUI's default; without it weights stay on the card")
    parser.add_argument("--cuda-malloc", action="store_true", help="cudaMallocAsync in any case; ComfyUI decides by torch's version")
    parser.add_argument("--disable-cuda-malloc", action="store_true", help="torch's own allocator")
    parser.add_argument("--short", action="store_true", help="for quality: a few pictures in this process, nothing written")
    parser.add_argument("--report", action="store_true", help="for quality: only curves and table, from the record that is there")
    for name, kind in (("part", str), ("record", Path), ("folder", Path), ("deadline", float)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.what = options.what or list(COMMANDS)
    options.models = options.models or ("flux-1024,defaults" if options.quick else MODELS)
    options.backends = options.backends or ("exact" if options.quick else "exact,auto")
    options.ranks = [int(count) for count in options.ranks.split(",")][: 1 if options.quick else None]
    options.modes = options.modes or ("off" if options.quick else "off,compile+graph")
    options.cpu = options.cpu or not has_card()
    return options


def has_card() -> bool:
    """Asked without torch, which must not be imported before the allocator is chosen."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


# -- the parent: a process for each part ------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> int:
    options.deadline = time.time() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="paradit-bench-") as folder:
        options.folder = Path(folder)
        try:
            record = begin(options)
            for name in parts(options):
                until_done(name, record.path, options)
        except Stale as stale:
            print(stale)
            return STALE
        show(Record.read(record.path))
    return 0


def begin(options: argparse.Namespace) -> Record:
    """The record to write: a new one, or a copy of the one to go on with."""
    out = options.out or (options.folder if options.quick else RECORDS)
    if options.resume:
        record = Record.read(options.resume)
        record.resume()
        record.path = out / options.resume.name
    else:
        name = f"{date.today().isoformat()}-{'cpu' if options.cpu else 'cuda'}-{'-'.join(options.what)}"
        taken = sum(1 for _ in out.glob(f"{name}*.json")) if out.exists() else 0
        record = Record(out / f"{name}{f'-{taken + 1}' if taken else ''}.json")
    record.write()
    return record


def parts(options: argparse.Namespace) -> list[str]:
    """What one process measures: a table, or a case of one. With ``--quick`` one process does it all."""
    found = []
    for what in options.what:
        cases = options.models.split(",") if what in BY_MODEL else [""]
        found += [f"{what}:{case}" for case in cases if case != "defaults" or what == "steps"]
    return [",".join(found)] if options.quick else found


def until_done(name: str, path: Path, options: argparse.Namespace) -> None:
    """Run a part; where its process ends early, run it again for the rows that are left."""
    print(f"== {name}", flush=True)
    own = ["--part", name, "--record", str(path), "--folder", str(options.folder), "--deadline", str(options.deadline)]
    log = (options.out or options.folder) / "bench.log"
    for _ in range(ATTEMPTS):
        if time.time() > options.deadline:
            break
        before = path.read_text()
        with log.open("a") as errors:
            status = subprocess.run([sys.executable, __file__, *sys.argv[1:], *own], stderr=errors, check=False).returncode
        if status == 0:
            return
        if status == STALE:
            raise Stale("Nothing was measured.")
        lines = [line[:200] for line in log.read_text(errors="replace").splitlines() if not line.startswith("INFO")]
        print(f"{name} ended with {status}:", *lines[-25:], sep="\n  ", flush=True)
        if path.read_text() == before:
            return
    print(f"{name}: no time is left; go on with --resume {path}", flush=True)


def show(record: Record) -> None:
    """What was measured, last and short."""
    print("\n" + " ".join(f"{name}={value}" for name, value in record.machine.items()))
    print(pages.results([record]))
    for row in record.tables.get("overhead", []):
        print(" ".join(f"{name}={value}" for name, value in row.items()))
    for name, row in record:
        if "failed" in row:
            print(f"{name}, {row.get('case')}, {row.get('way')} failed: {row['failed']}")
    print(f"record: {record.path}")


# -- a part -----------------------------------------------------------------------------------------------------------------


def part(options: argparse.Namespace) -> int:
    names = [name.partition(":")[::2] for name in options.part.split(",")]
    comfy_import.boot_comfy(flags(options, defaults=any(case == "defaults" for _, case in names)))
    comfy_import.initialise_memory()
    record = Record.read(options.record)
    try:
        record.take(machine(options.commit))
    except Stale as stale:
        print(stale)
        return STALE
    import folder_paths
    import torch
    from rows import TimeIsUp

    if options.quick:
        torch.set_num_threads(1)  # threads that wait for each other cost more than tiny models bring

    if options.turns is not None:
        turns.join(options.turns)
    user = options.folder / "user"  # times of attention kernels are remembered there: none are known at first
    user.mkdir(exist_ok=True)
    folder_paths.set_user_directory(str(user))
    try:
        for what, case in names:
            with turns.alone() if what in ALONE else nullcontext():
                table(record, what, case, options)
    except TimeIsUp:
        print(f"time is up; go on with --resume {options.record}")
    return 0


def flags(options: argparse.Namespace, *, defaults: bool) -> list[str]:
    """ComfyUI's, for this process."""
    if options.cpu:
        return ["--cpu"]
    if defaults:
        return []
    return [
        *([] if options.dynamic_vram else ["--disable-dynamic-vram"]),
        *(["--cuda-malloc"] if options.cuda_malloc else []),
        *(["--disable-cuda-malloc"] if options.disable_cuda_malloc else []),
    ]


def table(record: Record, what: str, case: str, options: argparse.Namespace) -> None:
    """Measure what is missing in ``record``."""
    if what == "steps":
        import steps

        steps.measure(record, case, options, options.folder)
    elif what == "profile":
        import kernel_times

        kernel_times.measure(record, case, options)
    elif what == "share":
        import lone_rank

        lone_rank.measure(record, case, options)
    elif what == "attention":
        import attention_kernels

        attention_kernels.measure(record, options)
    elif what == "peers":
        import peers

        peers.measure(record, case, options)
    elif what == "cache":
        import caching

        caching.measure(record, options)
    elif what == "group":
        import joining

        joining.measure(record, options)
    elif what == "overhead":
        import overhead

        for row in overhead.measure(quick=options.quick):
            record.put("overhead", row)


if __name__ == "__main__":
    sys.exit(main())
