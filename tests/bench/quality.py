"""What skipping work does to pictures: every way of saving, against the uncached run of the same prompt and seed.

The pictures of one setting are sampled one by one through ComfyUI's own sampler, since a cache decides for each run. Two
processes of one thread share the prompts. Every finished setting is kept in the cache folder until the whole
measurement is done, so that a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import quality_model
import quality_report
import torch
from env.prepare import Environment
from quality_metrics import psnr, ssim
from quality_model import Pictures
from quality_ways import SERIES, Accumulated, Setting, Work, calibrate

HERE = Path(__file__).resolve().parent
RECORD = HERE / "records" / "quality.json"
PAIRS, PROBE_PAIRS, PARTS, CALIBRATION = 64, 8, 2, 8
LATENT_SPAN = 8.0  # latents of a scaled autoencoder lie within four standard deviations

THRESHOLDS: dict[str, tuple[float, ...]] = {
    "fewer steps": (14, 12, 10, 8),
    "forecast": (0.1, 0.25, 0.5, 0.8, 1.2),
    "forecast from 20 %": (0.25, 0.5, 0.8, 1.2),
    "EasyCache": (0.08, 0.15, 0.25),
    "reuse": (0.08, 0.15, 0.25),
    "taylor": (0.08, 0.15, 0.25),
    "TeaCache rule": (0.05, 0.2),
    "LazyCache": (0.05, 0.15),
}
PROBED = {"fewer steps": 10, "forecast": 0.5, "EasyCache": 0.15, "reuse": 0.2, "taylor": 0.2}
PROBES = [("dpmpp_2m", "simple"), ("heun", "simple"), ("euler_ancestral", "simple"), ("euler", "beta")]
FEW = (4, 6, 8, 12)


def grid() -> list[Setting]:
    """Every series over its thresholds, at cfg 1 and 4."""
    return [Setting(series, value, cfg) for cfg in (1.0, 4.0) for series, values in THRESHOLDS.items() for value in values]


def probes() -> list[Setting]:
    """Other samplers and schedules, and few steps, each series at one threshold."""
    found = [Setting(series, value, 4.0, sampler, scheduler) for sampler, scheduler in PROBES for series, value in PROBED.items()]
    few = [(series, value) for series, value in PROBED.items() if series != "fewer steps"]
    return found + [Setting(series, value, 1.0, steps=steps) for steps in FEW for series, value in few]


def pairs(pictures: Pictures, count: int) -> list[tuple[str, int]]:
    """Prompts spread over the list, each with a seed of its own; the first ones are left to calibration."""
    prompts = list(pictures.prompts)[CALIBRATION:]
    return [(prompts[index * len(prompts) // count], 1000 + index) for index in range(count)]


class Bench:
    """Samples settings and compares them with stock; `pairs`: which pictures."""

    def __init__(self, pictures: Pictures, chosen: list[tuple[str, int]]):
        self.pictures, self.pairs = pictures, chosen
        self.work = Work(pictures.model)
        self._stock: dict[tuple[Setting, int], tuple[torch.Tensor, torch.Tensor, int, float]] = {}
        self._polynomials: dict[Setting, list[float]] = {}

    def patched(self, setting: Setting) -> Any:
        if setting.series == "TeaCache rule":
            return Accumulated(setting.value, self._polynomial(setting.stock)).attach(self.pictures.model)
        return SERIES[setting.series](self.pictures.model, setting.value)

    def _polynomial(self, stock: Setting) -> list[float]:
        if stock not in self._polynomials:
            prompts = list(self.pictures.prompts)[:CALIBRATION]

            def run(model: Any, index: int) -> None:
                self.pictures.sample(model, stock, prompts[index], 1 + index)

            self._polynomials[stock] = calibrate(self.pictures.model, run, CALIBRATION)
        return self._polynomials[stock]

    def _sample(self, model: Any, setting: Setting, pair: int) -> tuple[torch.Tensor, torch.Tensor, int, float]:
        """Latent, pixels, rows of blocks computed, seconds of sampling."""
        with self.work.counting():
            started = time.perf_counter()
            latent = self.pictures.sample(model, setting, *self.pairs[pair])
            seconds = time.perf_counter() - started
        return latent, self.pictures.decode(latent), self.work.rows, seconds

    def stock(self, setting: Setting, pair: int) -> tuple[torch.Tensor, torch.Tensor, int, float]:
        key = (setting.stock, pair)
        if key not in self._stock:
            self._stock[key] = self._sample(self.pictures.model, setting.stock, pair)
        return self._stock[key]

    def measure(self, setting: Setting) -> list[dict[str, float]]:
        """One row of numbers per picture."""
        rows, model = [], self.patched(setting)
        for pair in range(len(self.pairs)):
            latent, pixels, computed, seconds = self._sample(model, setting, pair)
            latent_0, pixels_0, computed_0, seconds_0 = self.stock(setting, pair)
            rows.append(
                {
                    "saved": round(1 - computed / computed_0, 4),
                    "psnr": round(psnr(pixels, pixels_0, 1.0), 3),
                    "ssim": round(ssim(pixels, pixels_0, 1.0, 2), 5),
                    "latent_psnr": round(psnr(latent, latent_0, LATENT_SPAN), 3),
                    "latent_ssim": round(ssim(latent[0], latent_0[0], LATENT_SPAN, 0), 5),
                    "seconds": round(seconds, 3),
                    "stock_seconds": round(seconds_0, 3),
                }
            )
        return rows


# -- in parts, resumable --------------------------------------------------------------------------------------------------


def key(pictures: Pictures) -> str:
    """Names what a kept result depends on: the weights, the cache, and the lines that sample and measure."""
    found = hashlib.sha256(pictures.digest.encode())
    cache = sorted((HERE.parents[1] / "para_core/cache").glob("*.py"))
    for path in (*cache, *(HERE / f"quality_{name}.py" for name in ("model", "ways", "metrics"))):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def part(index: int, count: int) -> None:
    """Measure every setting for every `count`-th pair, and append each to this part's file."""
    torch.set_num_threads(1)
    pictures = quality_model.load()
    path = kept(pictures, index)
    done = {Setting(**line["setting"]) for line in lines(path)}
    benches = [Bench(pictures, pairs(pictures, number)[index::count]) for number in (PAIRS, PROBE_PAIRS)]
    for bench, settings in zip(benches, (grid(), probes()), strict=True):
        for setting in settings:
            if setting in done:
                continue
            rows = bench.measure(setting)
            with path.open("a") as file:
                file.write(json.dumps({"setting": vars(setting), "rows": rows}) + "\n")
            print(index, setting, f"psnr {sum(row['psnr'] for row in rows) / len(rows):.2f}", flush=True)


def kept(pictures: Pictures, index: int) -> Path:
    folder = Environment.locate().tmp.parent / "quality"
    folder.mkdir(exist_ok=True)
    return folder / f"{key(pictures)}-{index}.jsonl"


def lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        yield from map(json.loads, path.read_text().splitlines())


def measure(machine: dict[str, str]) -> None:
    """The whole measurement: numbers, curves and table."""
    command = [sys.executable, str(HERE / "bench.py"), "quality", "--part"]
    running = [subprocess.Popen([*command, f"{index}/{PARTS}"]) for index in range(PARTS)]
    if any([process.wait() for process in running]):
        raise SystemExit("a part of the measurement failed; the same command goes on from here")
    pictures = quality_model.load()
    joined: dict[Setting, list[dict[str, float]]] = {}
    for index in range(PARTS):
        for line in lines(kept(pictures, index)):
            joined.setdefault(Setting(**line["setting"]), []).extend(line["rows"])
    columns = []
    for setting, rows in joined.items():
        numbers = {name: [row[name] for row in rows] for name in rows[0]}
        columns.append({**vars(setting), "pictures": len(rows), **numbers})
    RECORD.write_text(quality_report.record({"machine": machine, "model": pictures.name, "settings": columns}))
    report()


def report() -> None:
    """Curves and table of the record that is there."""
    quality_report.write(json.loads(RECORD.read_text()), HERE)


def short(pictures: Pictures | None = None, count: int = 4) -> dict[Setting, list[dict[str, float]]]:
    """A small sample in this process, at cfg 1: enough to see that the order of the series is right."""
    pictures = pictures or quality_model.load()
    bench = Bench(pictures, pairs(pictures, count))
    return {setting: bench.measure(setting) for setting in (Setting(series, value) for series, value in PROBED.items())}


def main(options: Any, machine: dict[str, str]) -> None:
    """`bench.py quality`."""
    if options.part:
        index, count = map(int, options.part.split("/"))
        part(index, count)
    elif options.report:
        report()
    elif options.short:
        for setting, rows in short().items():
            print(setting, {name: round(sum(row[name] for row in rows) / len(rows), 3) for name in rows[0]})
    else:
        measure(machine)
