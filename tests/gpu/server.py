"""The real ComfyUI server where there is a GPU: one graph, stock and accelerated, and faults, all by the API.

    python tests/gpu/server.py            every set of flags at the same time, a table last (about two minutes on one H100)
    python tests/gpu/server.py --cpu      the same with CPU ranks, to see that the script works
    python tests/gpu/server.py NAME ...   only these sets of flags

The model is the small trained one of tests/assets with its VAE. Every way runs twice with different seeds; the second prompt
is the one that is timed and compared with stock: latents bit by bit, and pictures. `two ranks` are two GPUs, or one card twice.
Each way's line of the report in /history is printed, and each of its sentences.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)  # this folder holds names of others
sys.path.append(str(HERE.parents[1]))

from gpu import processes  # noqa: E402

FLAGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "static": ("--disable-dynamic-vram",),
    "static, native": ("--disable-dynamic-vram", "--disable-cuda-malloc"),
}
HEADS = {"flags": 14, "way": 18, "ok": 4, "ranks": 5, "ms/step": 7, "first s": 7, "cached": 6, "replays": 7, "stock's": 9, "dB": 5}
PROMPT = "panda on white"
NEAR = {"stock": 40.0, "off": 28.0, "balanced": 20.0}  # dB: a second time, another kernel, cached steps; a fault does more
SOON = 5.0  # seconds in which an interrupt ends a prompt
LIMIT = 150.0  # seconds a prompt: the first one may compile


@dataclass(frozen=True)
class Way:
    patches: tuple[tuple[str, dict[str, Any]], ...] = ()
    ranks: int = 1
    cache: str = "off"


def ways(cards: int) -> dict[str, Way]:
    """What is put behind the loader. ``cards``: GPUs of this machine; 0: CPU ranks."""
    from env.graphs import parallel

    def accelerate(gpus: int, cache: str = "balanced") -> tuple[str, dict[str, Any]]:
        return "ParaAccelerate", {"gpus": gpus, "attention": "auto", "cache": cache, "compile": "auto"}

    two = (*((("TestOneCard", {}),) if cards == 1 else ()), parallel(2, batch=1), accelerate(2, "off"))
    found = {
        "stock": Way(cache="stock"),
        "1 GPU, cache off": Way((accelerate(1, "off"),)),
        "1 GPU": Way((accelerate(1),), cache="balanced"),
        "all GPUs": Way((accelerate(0),), ranks=0, cache="balanced"),
        "two ranks": Way(two, ranks=2),
    }
    if cards > 1:
        found["2 GPUs, cache off"] = Way((accelerate(2, "off"),), ranks=0)
        found["2 GPUs"] = Way((accelerate(2),), ranks=0, cache="balanced")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="; ".join(FLAGS))
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--jobs", type=int, help="servers at the same time")
    parser.add_argument("--log", type=Path, help="folder for the servers' logs")
    options = parser.parse_args()
    import torch

    cards = 0 if options.cpu else torch.cuda.device_count()
    write_models()
    started, names = time.time(), options.names or (["default"] if options.cpu else [*FLAGS])
    with tempfile.TemporaryDirectory(prefix="paradit-front-") as front, ThreadPoolExecutor(options.jobs or len(names)) as pool:
        found = list(pool.map(lambda name: case(name, cards, front, options.log), names))
    print("\n".join(text for _, text in found))
    sys.exit(bool(processes.table(HEADS, [row for own, _ in found for row in own], started)))


def write_models() -> None:
    """The folder of tiny models that the server links to, where the test environment was not prepared."""
    from env import models
    from env.prepare import Environment

    there = Environment.locate().models
    if not there.exists():
        there.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=there.parent) as folder:
            models.write_all(Path(folder) / "models")
            (Path(folder) / "models").rename(there)


def case(name: str, cards: int, front: str, logs: Path | None) -> tuple[list[list[str]], str]:
    """Rows of the table, and what else there is to read."""
    from env.server import Server

    rows: list[list[str]] = []
    text = [f"== {name}"]
    # two ranks on one card: NCCL takes that for a mistake unless they seem to be on two machines
    environment = {"NCCL_HOSTID": "paradit-rank0"} if cards == 1 else {}
    started = time.time()
    try:
        with Server([*FLAGS[name], "--front-end-root", front], environment) as server:
            text.append(f"ready after {time.time() - started:.0f} s: {memory(server)}")
            trial = Trial(name, server, steps=25 if cards else 12, text=text)
            for way, found in ways(cards).items():
                rows.append(trial.guarded(way, lambda way=way, found=found: trial.compare(way, found)))
            two = ways(cards)["two ranks"]
            rows.append(trial.guarded("interrupt", lambda: trial.interrupt(two)))
            rows.append(trial.guarded("worker killed", lambda: trial.lose(two, signal.SIGKILL)))
            rows.append(trial.guarded("two ranks again", lambda: trial.compare("two ranks again", two, seeds=(3, 4))))
            wrong = [line for line in server.log_text().splitlines() if line.startswith("Traceback") or "IMPORT FAILED" in line]
            text += [f"log: {line}" for line in dict.fromkeys(wrong)]
            if logs is not None:
                logs.mkdir(parents=True, exist_ok=True)
                (logs / f"{name.replace(', ', '-')}.log").write_text(server.log_text())
    except Exception as error:  # noqa: BLE001  the table says it, the other servers go on
        text.append(traceback.format_exc())
        rows.append(processes.failed(name, "-", HEADS, f"{type(error).__name__}: {error}"))
    return rows, "\n".join(text)


def memory(server: Any) -> str:
    """What the server says of its allocator and of dynamic VRAM."""
    words = ("cudaMallocAsync", "native", "DynamicVRAM", "dynamic vram")
    lines = [line.strip() for line in server.log_text().splitlines() if any(word.lower() in line.lower() for word in words)]
    return "; ".join(dict.fromkeys(line[-90:] for line in lines))


class Trial:
    """One server; prompts are told apart by their seeds, because ComfyUI does not run the same one twice."""

    def __init__(self, name: str, server: Any, *, steps: int, text: list[str]):
        self.name, self.server, self.steps, self.text = name, server, steps, text
        self.long = 4 * steps  # of prompts in which something happens
        self.stock: dict[int, tuple[Any, Path]] = {}
        self.seed = 0

    def guarded(self, way: str, make: Any) -> list[str]:
        try:
            row = make()
        except Exception as error:  # noqa: BLE001  the table says it, the next way is tried
            self.text.append(f"{self.name}, {way}: {traceback.format_exc()}")
            row = processes.failed(self.name, way, HEADS, f"{type(error).__name__}: {error}")
        print("  ".join(row), flush=True)  # the table comes at the very end
        return row

    def graph(self, patches: Any, seed: int, prompt: str = PROMPT, *, steps: int = 0) -> dict[str, Any]:
        from env import graphs

        graph = graphs.emoji(prompt, patches, graphs.Sampling(steps=steps or self.steps, cfg=4.0, seed=seed))
        return {**graph, "report": {"class_type": "ParaReport", "inputs": {"samples": ["sampler", 0]}}}

    def reference(self, seed: int, *, steps: int = 0) -> tuple[Any, Path]:
        if not self.stock:  # ComfyUI's first prompt may round otherwise than later ones
            self.server.run(self.graph((), 0), LIMIT).check()
        if seed not in self.stock:
            result = self.server.run(self.graph((), seed, steps=steps), LIMIT).check()
            self.stock[seed] = result.latent(), result.images()[0]
        return self.stock[seed]

    def compare(self, name: str, way: Way, *, seeds: tuple[int, int] = (1, 2)) -> list[str]:
        """Two prompts: the first one starts, compiles and captures, the second one counts. ComfyUI may remember what it has made before."""
        expected = self.reference(seeds[1])
        first = self.server.run(self.graph(way.patches, seeds[0]), LIMIT).check()
        known = len(self.server.reports())
        result = self.server.run(self.graph(way.patches, seeds[1], PROMPT.upper()), LIMIT).check()  # the same words, but not to ComfyUI
        self.text.append(f"{self.name}, {name}: {result.text('report').replace(chr(10), ' | ')[:700]}")
        return self.row(name, way, first, result, self.server.reports()[known:], expected)

    def row(self, name: str, way: Way, first: Any, result: Any, runs: Any, expected: Any, *, steps: int = 0) -> list[str]:
        import torch

        report = runs[-1] if runs else {}
        latent, picture = expected
        near = psnr(result.images()[0], picture)
        equal = torch.equal(result.latent(), latent)
        wrong = []
        if near < NEAR[way.cache]:
            wrong.append("another picture")
        if way.patches and not report:
            wrong.append("no run line")
        if way.ranks and report.get("ranks", 1) != way.ranks:
            wrong.append("other ranks")
        return [
            self.name,
            name,
            "FAIL" if wrong else "ok",
            str(report.get("ranks", 1)),
            f"{1000 * sampled(result) / (steps or self.steps):.1f}",
            f"{seconds(first):.1f}",
            str(report.get("cached", 0)),
            str(report.get("replays", 0)),
            "bits" if equal else f"{relative(result.latent(), latent):.1e}",
            f"{near:.0f}",
            "; ".join([*wrong, *report.get("notes", [])]),
        ]

    def interrupt(self, way: Way) -> list[str]:
        """Cancelled in the middle; the next prompt gives the right picture on as many ranks."""
        expected, (at, cancel) = self.reference(7), self.midway(self.server.interrupt)
        result = self.server.run(self.graph(way.patches, 6, steps=self.long), LIMIT, cancel)
        took = time.time() - at[0]
        known = len(self.server.reports())
        after = self.server.run(self.graph(way.patches, 7), LIMIT).check()
        row = self.row("interrupt", way, after, after, self.server.reports()[known:], expected)
        if result.status != "interrupted" or took > SOON:
            row[2] = "FAIL"
        return [*row[:-1], f"{result.status} after {took:.1f} s; then: {row[-1]}"]

    def lose(self, way: Way, kind: signal.Signals) -> list[str]:
        """A worker is hit in the middle; the prompt ends well, and says what happened."""
        expected = self.reference(8, steps=self.long)
        at, hit = self.midway(lambda: os.kill(workers(self.server.process.pid)[0], kind))
        known = len(self.server.reports())
        result = self.server.run(self.graph(way.patches, 8, steps=self.long), LIMIT, hit).check()
        row = self.row("worker killed", way, result, result, self.server.reports()[known:], expected, steps=self.long)
        if "computed on one GPU" not in row[-1]:
            row[2] = "FAIL"
        return [*row[:-1], f"{time.time() - at[0]:.1f} s to the end; {row[-1]}"]

    def midway(self, happens: Callable[[], None]) -> tuple[list[float], Callable[[dict[str, Any]], None]]:
        """A listener that has something happen once in the middle of a long run, and where it puts the time."""
        at: list[float] = []

        def listen(message: dict[str, Any]) -> None:  # the server leaves messages out where steps are fast
            if message["type"] == "progress" and message["data"]["value"] >= self.long // 4 and not at:
                at.append(time.time())
                happens()

        return at, listen


def workers(pid: int) -> list[int]:
    """Process ids of the server's sidecars."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                script = b"sidecar.py" in (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if parent == pid and script:
                found.append(int(folder.name))
    return found


def sampled(result: Any) -> float:
    """Seconds that the sampler node took."""
    times = [(message["data"]["node"], message["time"]) for message in result.messages if message["type"] == "executing"]
    return next(after - at for (node, at), (_, after) in itertools.pairwise(times) if node == "sampler")


def seconds(result: Any) -> float:
    return result.messages[-1]["time"] - result.messages[0]["time"]


def psnr(one: Path, other: Path) -> float:
    import numpy as np
    from PIL import Image

    difference = np.asarray(Image.open(one), np.float64) - np.asarray(Image.open(other), np.float64)
    square = float(np.square(difference).mean())
    return 10 * math.log10(255**2 / square) if square else math.inf


def relative(latent: Any, expected: Any) -> float:
    return float((latent - expected).norm() / expected.norm())


if __name__ == "__main__":
    main()
