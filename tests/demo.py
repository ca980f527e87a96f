"""`make demo`: prompts on the real ComfyUI server, stock and accelerated, with the same seed.

Leaves the pictures and side-by-side.png in demo-output/ and prints what the acceleration cost and brought. The model
is the small FLUX in tests/assets, trained on emoji.
"""

from __future__ import annotations

import math
import shutil
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
PROMPTS = ("octopus on sky", "red apple on white", "rocket on purple", "sunflower on teal")
SAMPLING = graphs.Sampling(steps=25, cfg=4.0, seed=7)
# Without CUDA a rank is a process on the CPU, and 2 are asked for; with CUDA, 0 asks for every GPU there is.
PATCHES = [graphs.first_block_cache(threshold=0.08), graphs.parallel(gpus=0 if torch.cuda.is_available() else 2)]


class DemoError(RuntimeError):
    """One sentence about what failed."""


@dataclass
class Run:
    picture: Path
    seconds_per_step: float
    ranks: str = "1"
    cached: str = "0"
    notes: tuple[str, ...] = ()


class ProgressBar:
    """One line of the terminal, fed by the server's messages. Elsewhere than on a terminal only its end is printed."""

    def __init__(self, label: str, steps: int) -> None:
        self.label, self.steps, self.step = label, steps, 0
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
            self.step = message["data"]["value"]

    def _tick(self) -> None:
        while sys.stdout.isatty() and not self._over.wait(0.1):
            print("\r" + self._line(), end="", flush=True)

    def _line(self) -> str:
        done = round(30 * self.step / self.steps)
        bar = "#" * done + "." * (30 - done)
        return f"  {self.label:<12} [{bar}] step {self.step:>2} of {self.steps}  {time.monotonic() - self.started:5.1f} s"


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
        add_report(server, accelerated)
    largest, psnr = compare(stock.picture, accelerated.picture)
    draw_side_by_side(stock.picture, accelerated.picture)
    print_table(stock, accelerated, largest, psnr)


def require_nodes(server: Server) -> None:
    for node_id, _ in PATCHES:
        if not server.object_info(node_id):
            reasons = [line for line in server.log_text().splitlines() if "paradit" in line and "annot import" in line]
            raise DemoError(f"the server does not know the node {node_id}. " + " ".join(reasons))


def sample(server: Server, name: str, patches: graphs.Patches) -> Run:
    graph = graphs.flux(patches, SAMPLING, width=SIZE, height=SIZE, decode=True)
    with ProgressBar(name, SAMPLING.steps) as bar:
        result = server.run(graph, timeout=300, listener=bar.listen)
    if result.status != "success":
        raise DemoError(f"the {name} prompt ended with {result.error}")
    picture = OUTPUT / f"{name}.png"
    shutil.copyfile(result.images()[0], picture)
    return Run(picture, seconds_per_step(result))


def seconds_per_step(result: Result) -> float:
    """Between the end of the first step, which also loads the model, and the end of the last."""
    progress = result.progress()
    (start, first, _), (end, last, _) = progress[0], progress[-1]
    return (end - start) / (last - first)


def add_report(server: Server, run: Run) -> None:
    reports = server.reports()
    if not reports:
        raise DemoError('the accelerated prompt left no "[ParaDiT] run:" line in the server\'s log.')
    report = reports[-1]
    batch, ring, ulysses = report["degrees"]
    run.ranks = str(report["ranks"])
    if report["ranks"] > 1:
        run.ranks += f" (batch {batch}, ring {ring}, Ulysses {ulysses})"
    run.cached = f"{report['cached']} of {report['forwards']}"
    run.notes = tuple(report["notes"])


def compare(first: Path, second: Path) -> tuple[int, float]:
    """Largest difference of a colour value (0..255), and PSNR in dB."""
    difference = np.asarray(Image.open(first), np.float64) - np.asarray(Image.open(second), np.float64)
    mean_square = float(np.square(difference).mean())
    return int(np.abs(difference).max()), 10 * math.log10(255**2 / mean_square) if mean_square else math.inf


def draw_side_by_side(stock: Path, accelerated: Path) -> None:
    pictures = [Image.open(stock).convert("RGB"), Image.open(accelerated).convert("RGB")]
    values = [np.asarray(picture, np.int32) for picture in pictures]
    pictures.append(Image.fromarray((np.abs(values[0] - values[1]) * GAIN).clip(0, 255).astype(np.uint8)))
    captions = ("stock", "accelerated", f"difference x {GAIN}")
    sheet = Image.new("RGB", (len(pictures) * SIZE, SIZE + 24), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        sheet.paste(picture, (column * SIZE, 24))
        draw.text((column * SIZE + 8, 6), caption, fill="black")
    sheet.save(OUTPUT / "side-by-side.png")


def print_table(stock: Run, accelerated: Run, largest: int, psnr: float) -> None:
    rows = [
        ("", "stock", "accelerated"),
        ("seconds per step", f"{stock.seconds_per_step:.3f}", f"{accelerated.seconds_per_step:.3f}"),
        ("ranks", stock.ranks, accelerated.ranks),
        ("cached steps", stock.cached, accelerated.cached),
        ("largest difference", "", f"{largest} of 255"),
        ("PSNR", "", "identical" if math.isinf(psnr) else f"{psnr:.1f} dB"),
    ]
    print()
    for name, left, right in rows:
        print(f"  {name:<20} {left:<10} {right}".rstrip())
    for note in accelerated.notes:
        print(f"  note: {note}")
    print(f"\nPictures: {OUTPUT.relative_to(CHECKOUT)}/side-by-side.png, stock.png, accelerated.png")


if __name__ == "__main__":
    sys.exit(main())
