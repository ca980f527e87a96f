"""`make demo`: prompts on the real ComfyUI server, stock and accelerated, with the same seed.

Leaves the pictures and side-by-side.png in demo-output/ and prints what the acceleration cost and brought. The model
is the small FLUX in tests/assets, trained on emoji.
"""

from __future__ import annotations

import math
import shutil
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from env import graphs
from env.prepare import CHECKOUT
from env.server import Message, PromptError, Result, Server, ServerError
from PIL import Image, ImageDraw

OUTPUT = CHECKOUT / "demo-output"
SIZE = 128  # pixels of a picture; shown twice as large
PROMPTS = ("trophy on sky", "mushroom on teal", "hamburger on yellow", "ghost on purple")
SAMPLING = graphs.Sampling(steps=25, cfg=4.0, seed=7)
# Without CUDA a rank is a process on the CPU, and 2 are asked for; with CUDA, 0 asks for every GPU there is.
PATCHES = [graphs.first_block_cache(threshold=0.08), graphs.parallel(gpus=0 if torch.cuda.is_available() else 2)]


class DemoError(RuntimeError):
    """One sentence about what failed."""


@dataclass
class Run:
    """One way of sampling, over all prompts."""

    pictures: list[Path]
    seconds_per_step: float  # median over the prompts
    ranks: str = "1"
    cached: str = "0"
    notes: tuple[str, ...] = ()


class ProgressBar:
    """One line of the terminal, fed by the server's messages. Elsewhere than on a terminal only its end is printed."""

    def __init__(self, label: str, steps: int) -> None:
        self.label, self.steps, self.step = label, steps, 0
        self.done = 0  # steps of earlier prompts
        self.started = time.monotonic()
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> ProgressBar:
        self._ticker.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._ticker.join()
        print(("\r" if sys.stdout.isatty() else "") + self._line(), flush=True)

    def listen(self, message: Message) -> None:
        if message["type"] == "progress" and message["data"]["node"] == "sampler":
            self.step = self.done + message["data"]["value"]

    def _tick(self) -> None:
        while sys.stdout.isatty() and not self._over.wait(0.1):
            print("\r" + self._line(), end="", flush=True)

    def _line(self) -> str:
        full = round(30 * self.step / self.steps)
        bar = "#" * full + "." * (30 - full)
        return f"  {self.label:<12} [{bar}] step {self.step:>3} of {self.steps}  {time.monotonic() - self.started:5.1f} s"


def main() -> int:
    try:
        demo()
    except (DemoError, PromptError, ServerError) as error:
        print(f"\ndemo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo stopped", file=sys.stderr)
        return 130
    return 0


def demo() -> None:
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir()
    print("Starting ComfyUI with this pack ...", flush=True)
    with Server() as server:
        require_nodes(server)
        stock = sample(server, "stock", [])
        accelerated = sample(server, "accelerated", PATCHES)
        add_reports(server, accelerated)
    draw_side_by_side(stock.pictures, accelerated.pictures)
    print_table(stock, accelerated)


def require_nodes(server: Server) -> None:
    for node_id, _ in PATCHES:
        if not server.object_info(node_id):
            reasons = [line for line in server.log_text().splitlines() if "paradit" in line and "annot import" in line]
            raise DemoError(f"the server does not know the node {node_id}. " + " ".join(reasons))


def sample(server: Server, name: str, patches: graphs.Patches) -> Run:
    pictures, seconds = [], []
    with ProgressBar(name, SAMPLING.steps * len(PROMPTS)) as bar:
        for number, prompt in enumerate(PROMPTS):
            bar.done = number * SAMPLING.steps
            result = server.run(graphs.emoji(prompt, patches, SAMPLING), timeout=300, listener=bar.listen)
            if result.status != "success":
                raise DemoError(f"the {name} prompt ended with {result.error}")
            pictures.append(OUTPUT / f"{prompt.replace(' ', '-')}-{name}.png")
            shutil.copyfile(result.images()[0], pictures[-1])
            seconds.append(seconds_per_step(result))
    return Run(pictures, statistics.median(seconds))


def seconds_per_step(result: Result) -> float:
    """Between the end of the first step, which also loads the model, and the end of the last."""
    progress = result.progress()
    (start, first, _), (end, last, _) = progress[0], progress[-1]
    return (end - start) / (last - first)


def add_reports(server: Server, run: Run) -> None:
    reports = server.reports()[-len(PROMPTS) :]
    if len(reports) < len(PROMPTS):
        raise DemoError('an accelerated prompt left no "[ParaDiT] run:" line in the server\'s log.')
    last = reports[-1]
    batch, ring, ulysses = last["degrees"]
    run.ranks = str(last["ranks"])
    if last["ranks"] > 1:
        run.ranks += f" (batch {batch}, ring {ring}, Ulysses {ulysses})"
    run.cached = f"{sum(one['cached'] for one in reports)} of {sum(one['forwards'] for one in reports)}"
    run.notes = tuple(dict.fromkeys(note for one in reports for note in one["notes"]))


def psnr(first: Path, second: Path) -> float:
    """In dB."""
    difference = np.asarray(Image.open(first), np.float64) - np.asarray(Image.open(second), np.float64)
    mean_square = float(np.square(difference).mean())
    return 10 * math.log10(255**2 / mean_square) if mean_square else math.inf


def draw_side_by_side(stock: list[Path], accelerated: list[Path]) -> None:
    """A row of stock pictures above a row of accelerated ones, twice as large."""
    side, left = 2 * SIZE, 90
    sheet = Image.new("RGB", (left + len(stock) * side, 2 * side), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (caption, pictures) in enumerate((("stock", stock), ("accelerated", accelerated))):
        draw.text((8, row * side + SIZE - 6), caption, fill="black")
        for column, picture in enumerate(pictures):
            large = Image.open(picture).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(large, (left + column * side, row * side))
    sheet.save(OUTPUT / "side-by-side.png")


def print_table(stock: Run, accelerated: Run) -> None:
    near = [psnr(one, other) for one, other in zip(stock.pictures, accelerated.pictures, strict=True)]
    rows = [
        ("", "stock", "accelerated"),
        ("seconds per step", f"{stock.seconds_per_step:.3f}", f"{accelerated.seconds_per_step:.3f}"),
        ("ranks", stock.ranks, accelerated.ranks),
        ("cached steps", stock.cached, accelerated.cached),
        ("PSNR, mean", "", f"{statistics.mean(near):.1f} dB"),
        ("PSNR, lowest", "", f"{min(near):.1f} dB"),
    ]
    print()
    for name, left, right in rows:
        print(f"  {name:<20} {left:<10} {right}".rstrip())
    for note in accelerated.notes:
        print(f"  note: {note}")
    print(f"\nPictures: {OUTPUT.relative_to(CHECKOUT)}/side-by-side.png, and each prompt's")


if __name__ == "__main__":
    sys.exit(main())
