"""The tables of RESULTS.md and the README's bars, from the records that are there. Imports neither torch nor ComfyUI."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from record import RECORDS, Record, Row

ROOT = Path(__file__).resolve().parents[2]
MARKS = {
    "tests/bench/RESULTS.md": ("<!-- speed: begin, written by bench.py report -->", "<!-- speed: end -->"),
    "README.md": ("<!-- bench -->", "<!-- /bench -->"),
}
TITLES = {
    "flux-1024": "FLUX.1-dev, 1024 x 1024",
    "flux-2048": "FLUX.1-dev, 2048 x 2048",
    "wan-480p": "Wan 2.1 14B, 832 x 480, 81 frames",
    "hunyuan-720p": "HunyuanVideo, 1280 x 720, 129 frames",
    "hunyuan-480p": "HunyuanVideo, 848 x 480, 73 frames",
    "cogvideox-5b": "CogVideoX-5B, 720 x 480, 49 frames",
    "defaults": "FLUX.1-dev, 1024 x 1024, from its file, ComfyUI's default settings",
}
KERNELS = ("pytorch", "cudnn", "flash", "sage", "sage3", "comfy-kitchen")
KINDS = ("matrices", "attention", "element by element", "copies", "messages")
SHOWN = 6  # kernels that are named
BAR = 12  # characters that stand for stock's speed
Found = list[tuple[dict[str, str], str, list[Row]]]
"""Machine, case and rows."""


def write(root: Path = ROOT, records: Path = RECORDS) -> None:
    """Put what the records say between the marks of both pages."""
    for name, text in pages(read(records)).items():
        path = root / name
        path.write_text(between(path.read_text(encoding="utf-8"), name, text), encoding="utf-8")


def between(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` between its marks."""
    begin, end = MARKS[name]
    return f"{page.partition(begin)[0]}{begin}\n{text}\n{end}{page.partition(end)[2]}"


def read(folder: Path) -> list[Record]:
    """The records of a folder, newest first."""
    found = [(Record.read(path), path.name) for path in sorted(folder.glob("*.json")) if path.name != "quality.json"]
    return [record for record, _ in sorted(found, key=lambda pair: (when(pair[0]), pair[1]), reverse=True)]


def when(record: Record) -> str:
    return record.machine.get("time", record.machine.get("date", ""))


def pages(records: list[Record]) -> dict[str, str]:
    """What belongs between the marks of each page."""
    gpu = [record for record in records if "CPU" not in record.machine.get("device", "CPU")]
    readme = [*bars(gpu), *fixed(records)]
    return {"tests/bench/RESULTS.md": results(gpu), "README.md": "\n".join(readme).strip()}


def results(records: list[Record]) -> str:
    """Every table, of the newest of ``records`` that has it."""
    kinds = step_tables, attention_table, cache_tables, profile_tables, share_tables, group_table
    return "\n".join(text for tables in kinds for text in tables(records)).strip()


def newest(records: list[Record], table: str, order: list[str] | None = None) -> Found:
    """Of each case of ``table`` and number of devices, the rows of the newest record that has measured any."""
    found: dict[tuple[str, str], tuple[dict[str, str], list[Row]]] = {}
    for record in records:
        count = record.machine.get("device", "").partition(" x ")[0]
        for case in dict.fromkeys(row.get("case", "") for row in record.tables.get(table, [])):
            rows = [row for row in record.tables[table] if row.get("case", "") == case]
            if (case, count) not in found and any("failed" not in row for row in rows):
                found[case, count] = (record.machine, rows)
    keys = list(found)
    if order and all(case in order for case, _ in keys):
        keys.sort(key=lambda key: (order.index(key[0]), key[1]))
    return [(found[key][0], key[0], found[key][1]) for key in keys]


def where(machine: dict[str, str], memory: str = "") -> str:
    """On what, when and at which commit, and what was special about it."""
    words = [machine["device"], *([memory] if memory else []), f"torch {machine['torch']}"]
    words += [f"{name} {machine[name]}" for name in ("driver", "sageattention", "comfy-kitchen") if name in machine]
    note = f" {machine['note']}" if "note" in machine else ""
    return f"{', '.join(words)}; {machine['date']} at {machine['commit']}.{note}"


def table(*head: str) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)


def line(*cells: object) -> str:
    return "| " + " | ".join("-" if cell is None else str(cell).replace("|", "/") for cell in cells) + " |"


def remark(row: Row) -> str:
    """What a reader must know beside the numbers."""
    notes = [*row.get("notes", []), *(["Timed while something else ran."] if row.get("disturbed") else [])]
    return f"failed: {row['failed']}" if "failed" in row else " ".join(notes) or row.get("absent", "")


# -- steps ------------------------------------------------------------------------------------------------------------------


def by_memory(records: list[Record], machine: dict[str, str], case: str, rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    """A case's rows by how memory was managed, each with those of other packages from the same record."""
    others = [row for record in records if record.machine is machine for row in record.tables.get("peers", []) if row["case"] == case]
    for memory in dict.fromkeys(row.get("memory", "") for row in rows):
        own = [row for row in rows if row.get("memory", "") == memory]
        stock = next((row["step_ms"] for row in own if row["way"] == "stock" and "step_ms" in row), None)
        both = [*own[:1], *others, *own[1:]]
        yield memory, [{**row, "over_stock": round(stock / row["step_ms"], 2)} if stock and "step_ms" in row else row for row in both]


def step_tables(records: list[Record]) -> Iterator[str]:
    for machine, case, rows in newest(records, "steps", list(TITLES)):
        for memory, own in by_memory(records, machine, case, rows):
            yield from ("", f"### A step of {TITLES[case]}", "", where(machine, memory), "")
            yield from table("way", "ms", "spread", "over stock", "launched after ms", "error of latents", "peak GiB", "kernels", "remark")
            for row in own:
                error = f"{float(row['error']):.1e}" if "error" in row else None
                times = [row.get(name) for name in ("step_ms", "spread_ms", "over_stock", "launch_ms")]
                replayed = f"{row['replays']} forwards replayed. " if row.get("replays") else ""
                sent = f"exchange {row['exchange_share']:.1%} of the forwards. " if row.get("exchange_share") is not None else ""
                yield line(row["way"], *times, error, row.get("peak_gib"), row.get("kernels"), (replayed + sent + remark(row)).strip())


# -- attention, cache, group ------------------------------------------------------------------------------------------------


def attention_table(records: list[Record]) -> Iterator[str]:
    """A line a shape; machines one after the other where shapes were not measured on the same."""
    last: dict[str, str] = {}
    for machine, case, rows in newest(records, "attention"):
        if machine is not last:
            last = machine
            yield from ("", "### Attention alone: ms (error against float32)", "", where(machine), "")
            yield from table("shape", *KERNELS, "`auto` chooses", "best over chosen", "`exact` chooses", "best over chosen", "timed in s")
        by_way = {row["way"]: row for row in rows}
        cells = [f"{row['ms']:g} ({row['error']:.0e})" if "ms" in row else None for name in KERNELS for row in [by_way.get(name, {})]]
        auto, exact = (by_way.get(name, {}) for name in ("auto", "exact"))
        yield line(case, *cells, auto.get("chosen"), auto.get("over"), exact.get("chosen"), exact.get("over"), auto.get("measured_s"))


def cache_tables(records: list[Record]) -> Iterator[str]:
    for machine, case, rows in newest(records, "cache"):
        misses, hits = ([row for row in rows if row["way"].startswith(what)] for what in ("miss", "hit"))
        yield from ("", f"### The cache itself: {TITLES[case]}", "", where(machine), "")
        yield from table("rule, blocks, memory", "off, ms", "on and never hitting, ms", "added %", "of each pair of runs, %", "remark")
        for row in misses:
            name = f"{row['way'].partition(', ')[2]}, {row['memory']}"
            yield line(name, *(row.get(key) for key in ("off_ms", "on_ms", "added_percent")), pairs(row), remark(row))
        yield ""
        yield from table("rule, blocks, memory", "full step, ms", "cached step, ms", "share", "cached steps", "remark")
        for row in hits:
            name = f"{row['way'].partition(', ')[2]}, {row['memory']}"
            yield line(name, *(row.get(key) for key in ("full_ms", "cached_ms", "share", "cached_steps")), remark(row))


def pairs(row: Row) -> str | None:
    return " ".join(f"{value:+.2f}" for value in row["pairs_percent"]) if "pairs_percent" in row else None


def group_table(records: list[Record]) -> Iterator[str]:
    for machine, case, rows in newest(records, "group"):
        if any("seconds" in row for row in rows):
            yield from ("", f"### Two ranks: {TITLES[case]}", "", where(machine), "")
            yield from table("", "seconds", "GB", "GB/s", "remark")
            for row in rows:
                yield line(row["way"], *(row.get(key) for key in ("seconds", "gb", "gb_a_second")), remark(row))


# -- where the time goes ----------------------------------------------------------------------------------------------------


def profile_tables(records: list[Record]) -> Iterator[str]:
    for machine, case, rows in newest(records, "profile", list(TITLES)):
        yield from ("", f"### Where the time goes: {TITLES[case]}, ms a step of one GPU under a profiler", "", where(machine), "")
        yield from table("way", *KINDS, "messages alone", "idle", "longest pause", "the longest kernels: times x ms in all", "remark")
        for row in rows:
            longest = ", ".join(f"`{short(name)}` {times} x {ms:g}" for name, times, ms in row.get("longest", [])[:SHOWN])
            yield line(row["way"], *spent(row), longest, remark(row))


def spent(row: Row) -> list[float | None]:
    """Milliseconds by kind, those in which only messages and in which nothing ran, and the longest of the latter in a row."""
    return [*(row.get("kinds_ms", {}).get(kind) for kind in KINDS), *(row.get(name) for name in ("exposed_ms", "idle_ms", "pause_ms"))]


def short(name: str) -> str:
    """A kernel's name without its types."""
    return re.split(r"[<(]", name.removeprefix("void "))[0][:60]


def share_tables(records: list[Record]) -> Iterator[str]:
    for machine, case, rows in newest(records, "share", list(TITLES)):
        yield from ("", f"### One rank's part of a step on one card: {TITLES[case]}", "", where(machine), "")
        times = "ms", "spread", "efficiency", "launched after ms"
        yield from table("way", *times, *KINDS, "messages alone", "idle", "longest pause", "remark")
        for row in rows:
            figures = [row.get(name) for name in ("step_ms", "spread_ms", "efficiency", "launch_ms")]
            yield line(row["way"], *figures, *spent(row), remark(row))


# -- the README -------------------------------------------------------------------------------------------------------------


def bars(records: list[Record]) -> Iterator[str]:
    """A bar for every way's speed, stock's being ``BAR`` long."""
    several = False
    for machine, case, rows in newest(records, "steps", list(TITLES)):
        for memory, own in by_memory(records, machine, case, rows):
            measured = [row for row in own if row.get("over_stock") is not None]
            several = several or any(row.get("ranks", 1) > 1 for row in measured)
            if measured:
                yield from ("", f"{TITLES[case]}, bf16, random weights. {where(machine, memory)}", "")
                yield from table("", "ms a step", "speed against stock ComfyUI in the same run")
                for row in measured:
                    bar = "█" * max(1, round(BAR * row["over_stock"]))
                    way = re.sub(r"(\d+) ranks?", lambda count: f"{count[1]} GPU{'s' if count[1] != '1' else ''}", row["way"])
                    yield line(way, f"{row['step_ms']:.1f}", f"`{bar}` {row['over_stock']:.2f}")
    yield from ("", "Measured by `python tests/bench/bench.py`; all tables are in [RESULTS.md](tests/bench/RESULTS.md), records beside it.")
    if not several:
        yield from ("", "Nothing was measured on several GPUs yet.")


def fixed(records: list[Record]) -> Iterator[str]:
    """Costs that do not depend on the model, from the newest record that has them."""
    for machine, _, rows in newest(records, "overhead"):
        costs = {row["measure"]: row for row in rows}
        hooks = next(row for name, row in costs.items() if name.startswith("hooks"))
        sent = [row for name, row in costs.items() if name.startswith("bytes")]
        words = [f"hooks {hooks['added_ms']:.2f} ms and header {costs['header']['added_ms']:.2f} ms a step on a model of 30 blocks"]
        start = costs.get("group of 2 ready", {}).get("seconds") or next(
            (row["seconds"] for own, _, rows in newest(records, "group") if own is machine for row in rows if row["way"] == "cold start"),
            None,
        )
        if start is not None:
            words.append(f"a group of two ranks is ready {start:.1f} s after its first use")
        if sent and all(row["bytes"] == row["formula"] for row in sent):
            words.append("the bytes that an attention call sends equal the published formula for Ulysses, ring and both")
        yield from (
            "",
            f"Fixed costs ({machine['device']}, torch {machine['torch']}, {machine['date']}, `make bench`): {'; '.join(words)}.",
        )
