"""Finished runs, and which of them made a latent.

Latents are moved, copied and changed on their way, so a run is known by the node that sampled: by its id within a prompt, and
by its signature (its class and inputs, with those of everything upstream), which is what ComfyUI's cache of results goes by.
A sampler whose result came from that cache has the signature of the one that ran, be it in an earlier prompt or another node.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from comfy_execution.graph import DynamicPrompt
from comfy_execution.graph_utils import is_link
from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context

LIMIT = 64  # runs kept
VALUES = 256  # of a latent that are compared


@dataclass(frozen=True)
class Mark:
    """What tells one latent from another: how many numbers it has, and some of them, float32 on the CPU."""

    count: int
    values: torch.Tensor

    def of(self, latents: torch.Tensor) -> bool:
        """Whether ``latents`` are these, perhaps in a narrower dtype (one that ComfyUI keeps results in)."""
        other = mark(latents)
        return self.count == other.count and torch.equal(self.values.to(latents.dtype).float(), other.values)


def mark(latents: torch.Tensor) -> Mark:
    """Of latents ``(B, C, ...)``, or of several nested ones, which ComfyUI samples packed into one row an image."""
    if getattr(latents, "is_nested", False):
        latents = torch.cat([part.reshape(part.shape[0], -1) for part in latents.unbind()], dim=1)
    flat = latents.reshape(-1)
    return Mark(flat.numel(), flat[:: max(1, flat.numel() // VALUES)][:VALUES].float().cpu())


@dataclass(frozen=True)
class Finished:
    """A run's report, and the node that made it: with those it was expanded from, by id and signature."""

    prompt: str
    nodes: dict[str, str]
    place: int | None
    latents: Mark
    report: dict[str, Any]


@dataclass(frozen=True)
class Found:
    """A run and the node, in words, that it was found at."""

    maker: str
    report: dict[str, Any]


_finished: deque[Finished] = deque(maxlen=LIMIT)


def keep(report: dict[str, Any], latents: Mark) -> None:
    """Remember the run of the node that is executing; without one (scripts) there is nobody who could ask for it."""
    context, progress = get_executing_context(), get_progress_state()
    if context is None or progress.prompt_id != context.prompt_id:
        return
    nodes: dict[str, str] = {}
    known: dict[str, str] = {}
    node = context.node_id
    while node is not None:
        nodes[node] = signature(progress.dynprompt, node, known)
        node = progress.dynprompt.get_parent_node_id(node)
    _finished.append(Finished(context.prompt_id, nodes, context.list_index, latents, report))


def find(graph: DynamicPrompt, node: str, samples: torch.Tensor) -> tuple[list[Found], str]:
    """The runs nearest upstream of ``node``'s input ``samples``, or none and a sentence why.

    Several are found where latents of equally near samplers were joined. The search does not go past a sampler: what one
    without a run has sampled was not made by those before it.
    """
    level, seen, stopped = sorted(set(_sources(graph, node, "samples"))), {node}, ""
    known: dict[str, str] = {}
    while level:
        found = [(maker, run) for maker in level if (run := _run(maker, signature(graph, maker, known), samples)) is not None]
        if found:
            return [Found(title(graph, maker), run.report) for maker, run in found], ""
        seen |= set(level)
        samplers = [maker for maker in level if any(_sources(graph, maker, "model", "guider"))]
        stopped = stopped or next((title(graph, maker) for maker in samplers), "")
        level = sorted({source for maker in level if maker not in samplers for source in _sources(graph, maker)} - seen)
    if stopped:
        return [], f"{stopped} has no report: no ParaDiT node was on its model, or it last ran too long ago. Run it again to see one."
    return [], "No sampler was found before this node. Connect the latents that a sampler made with ParaDiT nodes on its model."


def title(graph: DynamicPrompt, node: str) -> str:
    """A node as users know it."""
    entry = graph.get_node(node)
    return f"{entry.get('_meta', {}).get('title') or entry['class_type']} (node {node})"


def _run(node: str, own: str, samples: torch.Tensor) -> Finished | None:
    """The run of a node of signature ``own``: of this prompt and node if there is one, with these latents, at this place, last."""
    context = get_executing_context()
    prompt, place = (context.prompt_id, context.list_index) if context is not None else ("", None)
    runs = [run for run in _finished if own in run.nodes.values() or run.prompt == prompt and node in run.nodes]
    order = {
        index: (run.prompt == prompt, node in run.nodes, run.latents.of(samples), run.place == place, index)
        for index, run in enumerate(runs)
    }
    return runs[max(order, key=order.__getitem__)] if runs else None


def _sources(graph: DynamicPrompt, node: str, *names: str) -> Iterator[str]:
    """The nodes that ``node``'s inputs come from: all, or those of these names."""
    if graph.has_node(node):
        for name, value in graph.get_node(node)["inputs"].items():
            if is_link(value) and (not names or name in names):
                yield value[0]


def signature(graph: DynamicPrompt, node: str, known: dict[str, str]) -> str:
    """A hash of a node's class and inputs, and of those of every node upstream; ids do not count. ``known``: kept meanwhile."""
    waiting = [node]
    while waiting:  # not by recursion: graphs that were unrolled from loops are deep
        last = waiting[-1]
        missing = [source for source in _sources(graph, last) if source not in known]
        if missing:
            waiting += missing
            continue
        waiting.pop()
        if graph.has_node(last):
            entry = graph.get_node(last)
            inputs = [
                [name, known.get(value[0], ""), value[1]] if is_link(value) else [name, value]
                for name, value in sorted(entry["inputs"].items())
            ]
            known[last] = _hash([entry["class_type"], inputs])
        else:
            known[last] = ""
    return known[node]


def _hash(data: list[Any]) -> str:
    """Objects that are no plain data count by their class."""
    plain = json.dumps(data, skipkeys=True, default=lambda value: type(value).__qualname__)
    return hashlib.sha256(plain.encode()).hexdigest()
