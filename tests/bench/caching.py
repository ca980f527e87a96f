"""What the cache itself costs: a step with a cache that never hits against one without, and a cached step against a full one."""

from __future__ import annotations

import statistics
from argparse import Namespace

import cases
import comfy.model_management
import torch
from cases import WARM
from comfy.model_patcher import ModelPatcher
from record import Record, Row, memory
from rows import attempt
from sizes import CASES, Case, tiny

from para_core.cache.rule import RULES
from para_core.comfy.attach import attach
from para_core.settings import Attention, Cache, Compile

NAME = "flux-1024"
PAIRS = 6  # runs without and with the cache, in turns: clocks and temperature are the same for both
STEPS = 11
NEVER, ALWAYS = 1e-30, 1e30  # thresholds


def measure(record: Record, options: Namespace) -> None:
    """Rows for both rules and every mode of ``options.modes``."""
    cuda = torch.cuda.is_available()
    case = CASES[NAME] if cuda and not options.quick else tiny(CASES[NAME])
    wanted = [
        (f"{what}, {rule}, {mode}", what, rule, mode) for mode in options.modes.split(",") for rule in RULES for what in ("miss", "hit")
    ]
    missing = [row for row in wanted if record.find("cache", case=NAME, way=row[0], memory=memory()) is None]
    if not missing:
        return
    model = cases.build(case)
    for way, what, rule, mode in missing:
        with attempt(record, "cache", {"case": NAME, "way": way, "memory": memory()}, options) as row:
            plain = attach(attach(model, Attention("exact")), Compile(mode))
            pairs, steps = (1, 7) if options.quick else (PAIRS, STEPS)
            row.update(misses(plain, rule, case, pairs, steps) if what == "miss" else hits(plain, rule, case, steps))
    comfy.model_management.unload_all_models()


def misses(plain: ModelPatcher, rule: str, case: Case, pairs: int, steps: int) -> Row:
    """What is added to a step by comparing and remembering, in percent: of the medians of all steps, and of each pair of runs."""
    cached = attach(plain, Cache(threshold=NEVER, rule=rule))
    for model in (plain, cached):
        cases.sample(model, case, steps=WARM + 2)
    seconds: dict[str, list[list[float]]] = {"off": [], "on": []}
    for pair in range(pairs):
        for name, model in (("off", plain), ("on", cached))[:: 1 if pair % 2 == 0 else -1]:
            run = cases.sample(model, case, steps=steps)
            if name == "on" and run.report["cached"]:
                raise RuntimeError(f"{run.report['cached']} steps were cached")
            seconds[name].append(run.seconds)
    off, on = (statistics.median(step for run in seconds[name] for step in run) for name in ("off", "on"))
    each = [100 * (statistics.median(b) / statistics.median(a) - 1) for a, b in zip(seconds["off"], seconds["on"], strict=True)]
    return {
        "off_ms": round(off * 1e3, 3),
        "on_ms": round(on * 1e3, 3),
        "added_percent": round(100 * (on / off - 1), 2),
        "pairs_percent": [round(value, 2) for value in sorted(each)],
    }


def hits(plain: ModelPatcher, rule: str, case: Case, steps: int) -> Row:
    """Cached steps against computed ones, of runs that hit wherever they may."""
    cached = attach(plain, Cache(threshold=ALWAYS, rule=rule))
    full, run = (cases.sample(model, case, steps=steps) for model in (plain, cached))
    were = [hit for _, _, hit in run.report["changes"]][-len(run.seconds) - 1 : -1]
    skipped = [seconds for seconds, hit in zip(run.seconds, were, strict=True) if hit]
    if not skipped:
        raise RuntimeError("no step was cached")
    return {
        "full_ms": round(full.step * 1e3, 3),
        "cached_ms": round(statistics.median(skipped) * 1e3, 3),
        "cached_steps": len(skipped),
        "share": round(statistics.median(skipped) / full.step, 4),
        "replays": run.report["replays"],
        **({"notes": run.report["notes"]} if run.report["notes"] else {}),
    }
