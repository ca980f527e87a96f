"""A run's report in words: one line for the sampler while it runs, one when it has ended, and the whole of it."""

from __future__ import annotations

from statistics import median
from typing import Any

from ..attention.backends import Request


def live(step: int, steps: int, seconds: float, ranks: int, cached: int | None) -> str:
    """What the sampler's node shows between two steps. ``cached``: forwards, None without a cache."""
    parts = [f"step {step}/{steps}", f"{seconds / step:.3g} s/step"]
    if ranks > 1:
        parts.append(f"{ranks} ranks")
    if cached is not None:
        parts.append(f"{cached} cached")
    return ", ".join(parts)


def kind(request: Request) -> str:
    """A kind of attention call: rows of queries and keys, heads, what is special."""
    rows = f"{request.q_len}" if request.q_len == request.kv_len else f"{request.q_len} x {request.kv_len}"
    heads = f"{request.heads}" if request.heads == request.kv_heads else f"{request.heads} over {request.kv_heads}"
    words = [f"{rows} tokens", f"{heads} heads of {request.head_dim}", str(request.dtype).removeprefix("torch.")]
    if request.mask != "none":
        words.append(f"{request.mask} mask")
    if request.needs_lse:
        words.append("part of a ring")
    return ", ".join(words)


def ranks(report: dict[str, Any]) -> str:
    if report["ranks"] == 1:
        return "1 rank"
    degrees = f"{report['ranks']} ranks (batch x ring x ulysses = {' x '.join(map(str, report['degrees']))})"
    return degrees + (f", tokens shared {' : '.join(map(str, report['shares']))} by the GPUs' speed" if report["shares"] else "")


def cached(report: dict[str, Any]) -> str:
    """How many steps the cache skipped, as "9 of 20 steps cached"; steps in which only some forwards hit are named apart."""
    timeline = report["timeline"]
    hits = sum(step["hits"] == step["decisions"] > 0 for step in timeline)
    part = sum(0 < step["hits"] < step["decisions"] for step in timeline)
    return f"{hits} of {len(timeline)} steps cached" + (f", {part} more in part" if part else "")


def summary(report: dict[str, Any]) -> str:
    """The run in one line, for the node."""
    parts = [ranks(report), *([cached(report)] if report["cache"] else []), f"{report['seconds_per_step']:.3g} s a step"]
    return ", ".join(parts)


def text(report: dict[str, Any], maker: str) -> str:
    """The whole report. ``maker``: the node that sampled, by title and id."""
    return "\n".join([f"{maker}: {report['model']}", *_times(report), _ranks(report), _cache(report), *_attention(report), *_notes(report)])


def _times(report: dict[str, Any]) -> list[str]:
    timeline = report["timeline"]
    if not timeline:
        return ["Time: none, the model was not called."]
    many = "step" if report["steps"] == 1 else "steps"
    line = f"Time: {report['seconds_per_step']:.3g} s a step, {report['steps']} {many}, {report['wall']:.3g} s with the sampler's own work"
    later = timeline[1:]
    computed = [step["seconds"] for step in later if not step["hits"]]
    skipped = [step["seconds"] for step in later if step["hits"] == step["decisions"] > 0]
    parts = [f"first step {timeline[0]['seconds']:.3g} s"]
    if computed:
        parts.append(f"later ones {median(computed):.3g} s")
    if skipped:
        parts.append(f"cached ones {median(skipped):.3g} s")
    return [line, "      " + ", ".join(parts) + (" (medians)" if len(later) > 1 else "")]


def _ranks(report: dict[str, Any]) -> str:
    exchange = report["exchange"]
    if exchange is None:
        return "Ranks: 1"
    many = ranks(report).replace(" ranks", "")
    sent = f"{exchange['bytes'] / 1e6:.3g} MB sent a forward by the first rank"
    sent += ", q, k and v as int8" if exchange["wire"] else ""
    sent += f", heads in up to {exchange['parts']} parts" if exchange["parts"] > 1 else ""
    opening = report["opening"]
    times = f"{opening['workers']:.3g} s until the other ranks were there, {opening['model']:.3g} s until they had the model"
    ready = f"\n      before the first step: {times}"
    if exchange["share"] is None:
        return f"Ranks: {many}; {sent}, the time for it was not measured{ready}"
    return f"Ranks: {many}; exchange and waiting {exchange['share']:.0%} of the time, {sent}{ready}"


def _cache(report: dict[str, Any]) -> str:
    if report["cache"] is None:
        return "Cache: none"
    setting = report["cache"]
    way = setting["predictor"] if setting["rule"] == "classic" else setting["rule"]
    return f"Cache: {cached(report)}, threshold {setting['threshold']:g}, {way}"


def _attention(report: dict[str, Any]) -> list[str]:
    if report["override"] is not None:
        return [f"Attention: {report['override']}, another node's"]
    if report["backend"] is None:
        return ["Attention: ComfyUI's own"]
    seen = ", replays of CUDA graphs not counted" if report["replays"] else ""
    lines = [f"Attention: {report['backend']}{seen}"]
    lines += [f"      {name}: {calls} calls of {what}" for name, what, calls in report["kernels"]]
    return lines + [f"      {line}" for line in report["attention"] if " instead of " in line]


def _notes(report: dict[str, Any]) -> list[str]:
    return ["Fallbacks and notes:", *(f"- {note}" for note in report["notes"])] if report["notes"] else ["Fallbacks: none"]
