"""Where the time of a step goes: the kernels on the device, by what they are for."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter

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


def measure(record: Record, name: str, options: Namespace) -> None:
    """Rows of one case: stock, then one rank with every backend and mode."""
    case = sized(CASES[name], options)
    ways = {way: how for way, how in named(options).items() if way == "stock" or way.startswith("1 rank")}
    missing = [way for way in ways if record.find("profile", case=name, way=way, memory=memory()) is None]
    if not missing:
        return
    model = cases.build(case)
    for way in missing:
        with attempt(record, "profile", {"case": name, "way": way, "memory": memory()}, options) as row:
            row.update(profiled(ways[way](model), case))
    comfy.model_management.unload_all_models()


def profiled(model: ModelPatcher, case: Case) -> Row:
    """Milliseconds a step by kind and of the longest kernels, with how often they run. Profiling itself makes steps longer."""
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
    by_kind: Counter[str] = Counter()
    by_name: dict[str, list[float]] = {}
    busy: list[tuple[float, float]] = []
    for event in watch.events():
        if (event.device_type == DeviceType.CUDA) != cuda:
            continue
        microseconds = event.device_time_total if cuda else event.self_cpu_time_total
        by_kind[kind(event.name)] += microseconds
        busy.append((event.time_range.start, event.time_range.end))
        found = by_name.setdefault(event.name[:80], [0, 0.0])
        found[0], found[1] = found[0] + 1, found[1] + microseconds
    longest = sorted(by_name.items(), key=lambda item: -item[1][1])[:SHOWN]
    pauses = idle(busy)
    return {
        "kinds_ms": {name: round(value / 1e3 / STEPS, 2) for name, value in by_kind.most_common()},
        "idle_ms": round(sum(pauses) / 1e3 / STEPS, 2),
        "pause_ms": round(max(pauses, default=0.0) / 1e3, 2),
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


def kind(name: str) -> str:
    lower = name.lower()
    if lower.startswith("triton_"):  # the compiler's, named after what stands around them
        return "element by element"
    return next((kind for kind, words in KINDS.items() if any(word in lower for word in words)), "element by element")
