"""What to run first on a machine with two GPUs or more: each part rests on those before it, and the likeliest to break come soonest.

    python tests/gpu/first.py            all of it, a table last (a quarter of an hour on two cards, by guess)
    python tests/gpu/first.py --cpu      the same with CPU ranks and tiny models, to see that it works
    python tests/gpu/first.py NAME ...   only these parts
    ... --all                            goes on after a part that failed

Prints what the parts print, NCCL's warnings among it, and how the cards are connected.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOST = {"NCCL_P2P_DISABLE": "1", "NCCL_CUMEM_HOST_ENABLE": "0"}  # as between cards that do not reach each other's memory


@dataclass(frozen=True)
class Part:
    """A command of Python's. ``small``: the same without GPUs."""

    command: tuple[str, ...]
    small: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


def script(name: str, *names: str, small: tuple[str, ...] = (), host: bool = False) -> Part:
    path = f"tests/gpu/{name}.py"
    return Part((path, *names), (path, *(small or names), "--cpu"), tuple(HOST.items()) if host else ())


COLLECTIVES = ("-m", "pytest", "-q", "tests/unit/group/test_communicator.py", "-k")
BENCH = ("tests/bench/bench.py", "group", "steps", "--models", "flux-1024")
PARTS = {
    "collectives": Part((*COLLECTIVES, "cuda"), (*COLLECTIVES, "cpu")),
    "exchange": script("exchange", "cudnn", "blocks", small=("pytorch",)),
    "two ranks": script("ranks", "2"),
    "two ranks, through the host": script("ranks", "2", host=True),
    "weights": script("weights", "classic", "dynamic", "dynamic-fp8", small=("classic",)),
    "faults": script("faults", "off", "graph", small=("off", "--only", "memory")),
    "faults, through the host": script("faults", "off", small=("off", "--only", "memory"), host=True),
    "server": script("server", small=("default",)),
    "speed": Part((*BENCH, "--disable-cuda-malloc"), (*BENCH, "--quick", "--cpu")),
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="; ".join(PARTS))
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args(arguments)
    if not options.cpu and (tool := shutil.which("nvidia-smi")):
        subprocess.run([tool, "topo", "-m"], check=False)
    rows = []
    for name in options.names or PARTS:
        part = PARTS[name]
        print(f"\n==== {name}", flush=True)
        began = time.monotonic()
        environment = {"NCCL_DEBUG": "WARN", **os.environ, **dict(part.environment)}
        code = subprocess.run(
            [sys.executable, *(part.small if options.cpu else part.command)], cwd=ROOT, env=environment, check=False
        ).returncode
        rows.append((name, code, time.monotonic() - began))
        if code and not options.all:
            break
    print("\n" + "\n".join(f"{name:30}{'ok' if not code else f'FAIL ({code})':12}{seconds:6.0f} s" for name, code, seconds in rows))
    return sum(code != 0 for _, code, _ in rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
