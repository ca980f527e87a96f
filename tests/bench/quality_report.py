"""The quality measurement as pictures and tables: made from the record alone, so that they can be made again from it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from quality_metrics import at, mean, worst

from para_core.cache.presets import PRESETS

Column = dict[str, Any]
BEGIN, END = "<!-- quality: begin, written by bench.py quality -->", "<!-- quality: end -->"
CFGS = (1.0, 4.0)
PRESET_SERIES = "forecast from 20 %"
PRESET_NUMBERS = (("saved", mean), ("psnr", mean), ("psnr", worst))
SAVINGS = (0.25, 0.4, 0.5, 0.6)
COLOURS = {
    "fewer steps": "#7f7f7f",
    "reuse": "#1f77b4",
    "taylor": "#17becf",
    "forecast": "#2ca02c",
    PRESET_SERIES: "#8bc34a",
    "EasyCache": "#d62728",
    "LazyCache": "#ff7f0e",
    "TeaCache rule": "#9467bd",
}


def record(found: dict[str, Any]) -> str:
    """JSON with one line a setting."""
    head = {name: value for name, value in found.items() if name != "settings"}
    settings = ",\n".join("  " + json.dumps(column) for column in found["settings"])
    return json.dumps(head)[:-1] + ',\n "settings": [\n' + settings + "\n ]}\n"


def main_grid(columns: Sequence[Column], cfg: float) -> dict[str, list[Column]]:
    """The grid's columns of one cfg by series, by what they save."""
    largest = max(column["pictures"] for column in columns)
    found: dict[str, list[Column]] = {}
    for column in columns:
        if column["cfg"] == cfg and column["pictures"] == largest and (column["sampler"], column["scheduler"]) == ("euler", "simple"):
            found.setdefault(column["series"], []).append(column)
    return {series: sorted(those, key=lambda column: mean(column["saved"])) for series, those in found.items()}


def curve(columns: Sequence[Column], name: str, how: Callable[[Sequence[float]], float]) -> list[tuple[float, float]]:
    return [(mean(column["saved"]), how(column[name])) for column in columns]


def write(found: dict[str, Any], folder: Path) -> None:
    draw(found["settings"], folder / "quality.png")
    path = folder / "RESULTS.md"
    text = path.read_text() if path.exists() else f"# Results\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{section(found)}\n{END}{after}")


def draw(columns: Sequence[Column], path: Path) -> None:
    """Mean and worst pictures over what is saved, PSNR above and SSIM below, cfg 1 on the left and 4 on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 9), sharex=True, sharey="row")
    for place, cfg in enumerate(CFGS):
        for row, (name, title) in enumerate((("psnr", "PSNR, dB"), ("ssim", "SSIM"))):
            axis = axes[row][place]
            for series, those in main_grid(columns, cfg).items():
                colour, width = COLOURS[series], 2.4 if series == "forecast" else 1.3
                axis.plot(*zip(*curve(those, name, mean), strict=True), "o-", color=colour, label=series, markersize=3.5, linewidth=width)
                axis.plot(*zip(*curve(those, name, worst), strict=True), "--", color=colour, linewidth=width / 2)
            axis.axvline(0.5, color="#cccccc", linewidth=1, zorder=0)
            axis.grid(alpha=0.25)
            axis.set_title(f"cfg {cfg:g}: {title}")
    axes[0][0].legend(fontsize=9)
    for axis in axes[1]:
        axis.set_xlabel("share of block computation skipped")
    figure.suptitle("Against the uncached run of the same prompt and seed. Lines: mean; dashed: mean of the worst 5 %.", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def section(found: dict[str, Any]) -> str:
    columns = found["settings"]
    return "\n".join([*facts(found), *goals(columns), *presets(columns), *tables(columns), *probe_table(columns)])


def facts(found: dict[str, Any]) -> Iterator[str]:
    machine, columns = found["machine"], found["settings"]
    pictures, steps = max(column["pictures"] for column in columns), columns[0]["steps"]
    yield f"Model: {found['model']}. {pictures} pictures (a prompt and a seed each), {steps} steps of euler, schedule simple."
    yield f"Measured {machine['date']} at {machine['commit']}, torch {machine['torch']}, {machine['device']}."
    yield ""
    yield "![Quality over saved computation](quality.png)"


def table(title: str, *head: str) -> Iterator[str]:
    """A title, and the head of the table under it."""
    yield from ("", f"### {title}", "", "|" + "".join(f" {cell} |" if cell else " |" for cell in head), "|" + "---|" * len(head))


def goals(columns: Sequence[Column]) -> Iterator[str]:
    """What rule `forecast` was to reach with half of all blocks skipped, and what it does."""
    yield from table("Goals of rule `forecast`, with half of all blocks skipped", "", "goal", "cfg 1", "cfg 4")
    grids = [main_grid(columns, cfg) for cfg in CFGS]

    def half(grid: dict[str, list[Column]], series: str, how: Callable = mean) -> float:
        found = at(0.5, curve(grid[series], "psnr", how)) if series in grid else None
        return math.nan if found is None else found

    for name, goal, series in (("over EasyCache", 1, "EasyCache"), ("over fewer steps", 3, "fewer steps")):
        cells = [f"{half(grid, 'forecast') - half(grid, series):+.1f} dB" for grid in grids]
        yield f"| mean PSNR {name} | at least {goal:+d} dB | {' | '.join(cells)} |"
    for series in ("forecast", PRESET_SERIES):
        cells = [f"{half(grid, series) - half(grid, series, worst):.1f} dB" for grid in grids]
        yield f"| worst 5 % under the mean, {series} | at most 6 dB | {' | '.join(cells)} |"
    cells = [f"{nearest(grid):+.1f} dB" for grid in grids]
    yield f"| over fewer steps, where it is nearest to them | above 0 dB | {' | '.join(cells)} |"


def nearest(grid: dict[str, list[Column]]) -> float:
    """The smallest lead of `forecast` over fewer steps at a saving that both have."""
    ours, theirs = (curve(grid[series], "psnr", mean) for series in ("forecast", "fewer steps"))
    leads = [(at(saved, ours), at(saved, theirs)) for saved, _ in ours + theirs]
    return min(mine - other for mine, other in leads if mine is not None and other is not None)


def presets(columns: Sequence[Column]) -> Iterator[str]:
    """What the presets save and cost here."""
    yield from table("Presets", "preset", "threshold", "skipped, PSNR mean / worst 5 % at cfg 1", "at cfg 4")
    for name, preset in PRESETS.items():
        cells = []
        for cfg in CFGS:
            those = main_grid(columns, cfg)[PRESET_SERIES]
            values = [at(preset.threshold, [(column["value"], how(column[what])) for column in those]) for what, how in PRESET_NUMBERS]
            cells.append("-" if None in values else f"{values[0]:.0%}, {values[1]:.1f} / {values[2]:.1f}")
        yield f"| `{name}` | {preset.threshold:g} | {' | '.join(cells)} |"


def number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def tables(columns: Sequence[Column]) -> Iterator[str]:
    """Every series at equal saving."""
    for cfg in CFGS:
        title = f"cfg {cfg:g}: PSNR in dB (mean / worst 5 %) and SSIM at equal block computation skipped"
        yield from table(title, "", *(f"{saving:.0%}" for saving in SAVINGS), "latents at 50%", "threshold at 50%", "seconds at 50%")
        for series, those in main_grid(columns, cfg).items():
            cells = []
            for saving in SAVINGS:
                values = [at(saving, curve(those, name, how)) for name, how in (("psnr", mean), ("psnr", worst), ("ssim", mean))]
                cells.append(f"{number(values[0])} / {number(values[1])}, {number(values[2], 3)}" if values[0] is not None else "-")
            latents = at(0.5, curve(those, "latent_psnr", mean))
            threshold = at(0.5, [(mean(column["saved"]), column["value"]) for column in those])
            seconds = at(0.5, [(mean(column["saved"]), sum(column["seconds"]) / sum(column["stock_seconds"])) for column in those])
            yield f"| {series} | " + " | ".join([*cells, number(latents), number(threshold, 3), number(seconds, 2)]) + " |"


def probe_table(columns: Sequence[Column]) -> Iterator[str]:
    """Other samplers, schedules and step counts, each series at one threshold."""
    largest = max(column["pictures"] for column in columns)
    head = ("sampler", "schedule", "steps", "series", "threshold", "skipped", "PSNR mean / worst 5 %", "SSIM")
    yield from table("Probes: other samplers and schedules (cfg 4), few steps (cfg 1)", *head)
    for column in columns:
        if column["pictures"] != largest:
            yield (
                f"| {column['sampler']} | {column['scheduler']} | {column['steps']} | {column['series']} | {column['value']:g} | "
                f"{mean(column['saved']):.0%} | {mean(column['psnr']):.1f} / {worst(column['psnr']):.1f} | {mean(column['ssim']):.3f} |"
            )
