"""Speed and correctness on a machine with several GPUs that is there for minutes only: lanes of commands side by side.

    python tests/gpu/at_once.py --out FOLDER --minutes 12    every lane; logs and records in the folder, a table last
    python tests/gpu/at_once.py --out FOLDER --cpu           the same with CPU ranks and tiny models, to see that it works
    ... LANE ...                                             only these lanes

First what is timed: models are built, blocks compiled and ranks started side by side, and whatever is timed has the machine to
itself (`tests/bench/turns.py`). The first commands' models fit on a card of 140 GB together; what most depends on comes first in a
lane. Then what is only right or wrong, all at once. Beside what is timed it would hold everyone up: the first time this was tried, six
minutes on two H200 (2026-11-30 at 2c23698), processes that were being killed and started again were waited for before each timing,
and of speed only stock's was seen.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCH = "tests/bench/bench.py"
NATIVE = "--disable-cuda-malloc"


@dataclass(frozen=True)
class Command:
    """A command of Python's. ``small``: what is added without GPUs. ``timed``: it takes turns."""

    name: str
    words: tuple[str, ...]
    small: tuple[str, ...] = ("--cpu",)
    timed: bool = False


def bench(name: str, what: str, model: str, backend: str, modes: str) -> Command:
    words = (BENCH, *what.split(), "--models", model, "--backends", backend, "--modes", modes, NATIVE)
    return Command(name, words, ("--quick", "--cpu", "--modes", "off"), timed=True)


def script(path: str, *names: str) -> Command:
    return Command(path, (f"tests/gpu/{path}.py", *names))


TIMED: dict[str, tuple[Command, ...]] = {
    "flux": (
        bench("flux-1024", "steps", "flux-1024", "exact", "compile+graph,off"),
        bench("flux-2048", "steps", "flux-2048", "exact", "compile+graph"),
    ),
    "wan": (
        bench("wan", "steps", "wan-480p", "auto", "compile"),
        bench("flux-profile", "profile --traces", "flux-1024", "exact", "compile+graph"),
    ),
    "hunyuan": (bench("hunyuan", "steps", "hunyuan-480p", "auto", "compile"),),
    "cogvideox": (
        bench("cogvideox", "steps", "cogvideox-5b", "auto", "compile"),
        bench("defaults", "group steps", "defaults", "exact", "off"),
    ),
}
RIGHT: dict[str, tuple[Command, ...]] = {
    "collectives": (Command("collectives", ("-m", "pytest", "-q", "tests/unit/group/test_communicator.py", "-k", "cuda"), ("-k", "cpu")),),
    "ranks": (script("ranks", "2"),),
    "faults": (script("faults", "off", "graph"),),
    "server": (script("server", "default"),),
    "weights": (script("weights", "classic", "dynamic"),),
}


class Lane:
    """Runs its commands one after the other and keeps a line of each."""

    def __init__(self, options: argparse.Namespace, deadline: float):
        self._options, self._deadline = options, deadline
        self.rows: list[str] = []

    def run(self, commands: tuple[Command, ...]) -> None:
        for command in commands:
            left = self._deadline - time.time()
            if left < 5:
                self.rows.append(f"{command.name:14}no time was left")
                continue
            began = time.time()
            code = self._call(command, left)
            self.rows.append(f"{command.name:14}{'ok' if code == 0 else f'FAIL ({code})':12}{time.time() - began:6.0f} s")
            print(self.rows[-1], flush=True)

    def _call(self, command: Command, left: float) -> int | str:
        out = self._options.out / command.name
        out.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, *command.words, *(command.small if self._options.cpu else ())]
        if command.timed:
            words += ["--turns", str(self._options.out / "turns"), "--out", str(out), "--minutes", f"{left / 60:.2f}"]
            words += ["--commit", self._options.commit] if self._options.commit else []
        with (out / "log").open("w") as log:
            process = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                return process.wait(left)
            except subprocess.TimeoutExpired:
                return "late"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lanes", nargs="*", metavar="LANE", help="; ".join([*TIMED, *RIGHT]))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30, help="what has not ended then is ended")
    parser.add_argument("--commit", default="", help="what is measured, where git cannot tell")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args(arguments)
    options.out = options.out.absolute()
    deadline, rows = time.time() + 60 * options.minutes, []
    for lanes in (TIMED, RIGHT):
        wanted = [(Lane(options, deadline), commands) for name, commands in lanes.items() if name in (options.lanes or lanes)]
        with ThreadPoolExecutor(len(lanes)) as pool:
            list(pool.map(lambda pair: pair[0].run(pair[1]), wanted))
        rows += [row for lane, _ in wanted for row in lane.rows]
    print("\n" + "\n".join(rows))
    return sum(" ok " not in row for row in rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
