"""Where the time of a step goes: the kernels on the device, by what they are for."""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections import Counter
from pathlib import Path

import cases
import comfy.model_management
import torch
from cases import WARM
from comfy.model_patcher import ModelPatcher
from record import Record, Row, memory
from rows import attempt
from sizes import CASES, Case
from steps import named, sized
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "attention": ("fmha", "flash", "sdpa", "attn", "attention", "qk_int8", "quant", "subtractmean", "sub_mean", "transposepadpermute"),
    "matrices": ("gemm", "nvjet", "cutlass", "cublas", "splitk", "addmm", "mkl", "linear"),
    "messages": ("nccl", "wait"),
    "copies": ("memcpy", "memset", "copy", "pack"),
}
"""Parts of kernels' names, the first that fits. What is none of these is element by element: norms, modulation, rotation, sums."""
STEPS = 2  # that are looked at
SHOWN = 10  # kernels that are named
PAUSES = (2.0, 5.0, 20.0, 200.0)  # microseconds


def measure(record: Record, name: str, options: Namespace) -> None:
    """Rows of one case: stock, then every backend and mode on one rank and on several, of which rank 0 is looked at."""
    case, ways = sized(CASES[name], options), named(options)
    missing = [way for way in ways if record.find("profile", case=name, way=way, memory=memory()) is None]
    if not missing:
        return
    model = cases.build(case)
    for way in missing:
        with attempt(record, "profile", {"case": name, "way": way, "memory": memory()}, options) as row:
            trace = record.path.parent / f"trace-{name}-{way.replace(', ', '-').replace(' ', '-')}.json.gz" if options.traces else None
            row.update(profiled(ways[way](model), case, trace))
    comfy.model_management.unload_all_models()


def profiled(model: ModelPatcher, case: Case, trace: Path | None = None) -> Row:
    """Milliseconds a step by kind and of the longest kernels, with how often they run. Profiling itself makes steps longer.

    exposed_ms: in which messages are all that runs. pauses: how often nothing runs for as long as ``PAUSES`` say, and those
    milliseconds. trace: where every kernel is written, for chrome://tracing.
    """
    cuda = torch.cuda.is_available()
    watch = profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU], acc_events=True)
    steps = max(case.steps, WARM + STEPS + 1)

    def look(step: int) -> None:
        if step == WARM - 1:
            watch.start()
        elif step == WARM - 1 + STEPS:
            if cuda:
                torch.cuda.synchronize()
            watch.stop()

    cases.sample(model, case, steps=steps, watch=look)
    if trace is not None:
        watch.export_chrome_trace(str(trace))
    by_kind: Counter[str] = Counter()
    by_name: dict[str, list[float]] = {}
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}  # messages, everything else
    for event in watch.events():
        if (event.device_type == DeviceType.CUDA) != cuda:
            continue
        microseconds = event.device_time_total if cuda else event.self_cpu_time_total
        by_kind[kind(event.name)] += microseconds
        spans[kind(event.name) == "messages"].append((event.time_range.start, event.time_range.end))
        found = by_name.setdefault(event.name[:80], [0, 0.0])
        found[0], found[1] = found[0] + 1, found[1] + microseconds
    messages = covered(spans[True] + spans[False]) - covered(spans[False])
    longest = sorted(by_name.items(), key=lambda item: -item[1][1])[:SHOWN]
    pauses = idle(spans[True] + spans[False])
    return {
        "kinds_ms": {name: round(value / 1e3 / STEPS, 2) for name, value in by_kind.most_common()},
        "exposed_ms": round(messages / 1e3 / STEPS, 2),
        "idle_ms": round(sum(pauses) / 1e3 / STEPS, 2),
        "pause_ms": round(max(pauses, default=0.0) / 1e3, 2),
        "pauses": by_length(pauses),
        "longest": [[name, round(count / STEPS), round(value / 1e3 / STEPS, 2)] for name, (count, value) in longest],
    }


def idle(busy: list[tuple[float, float]]) -> list[float]:
    """How long each pause is between the first and the last of these spans. Between two steps is usually the longest."""
    found, reached = [], min((start for start, _ in busy), default=0.0)
    for start, end in sorted(busy):
        if start > reached:
            found.append(start - reached)
        reached = max(reached, end)
    return found


def by_length(pauses: list[float]) -> list[list[float]]:
    """How many pauses a step has that are shorter than each of ``PAUSES`` and not counted before, last the others, and milliseconds."""
    found = []
    for shortest, end in itertools.pairwise((0.0, *PAUSES, float("inf"))):
        own = [pause for pause in pauses if shortest <= pause < end]
        found.append([round(len(own) / STEPS, 1), round(sum(own) / 1e3 / STEPS, 3)])
    return found


def covered(busy: list[tuple[float, float]]) -> float:
    """How long any of these spans lasts."""
    if not busy:
        return 0.0
    return max(end for _, end in busy) - min(start for start, _ in busy) - sum(idle(busy))


def kind(name: str) -> str:
    lower = name.lower()
    if lower.startswith("triton_"):  # the compiler's, named after what stands around them
        return "element by element"
    return next((kind for kind, words in KINDS.items() if any(word in lower for word in words)), "element by element")
