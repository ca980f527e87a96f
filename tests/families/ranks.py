"""Calls of a tiny model as stock code makes them, and shared by ranks that are threads: one deep copy of the model each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace as replace_fields
from typing import Any

import torch
from unit.fake_comm import fake_comms, fake_meshes, on_ranks

from para_core.attention.choice import Chooser
from para_core.cache.first_block import Step, chunks
from para_core.execution.compiled import CompiledBlocks
from para_core.execution.override import OVERRIDE
from para_core.execution.runner import Runner
from para_core.plans import plan_for
from para_core.sequence.layout import balanced
from para_core.sequence.replace import replace
from para_core.sequence.solo import SOLO_MESH

Result = list[torch.Tensor]
Call = dict[str, Any]


class NoResult(Exception):
    """Ends a rank's call where a sidecar's ends: what stock code does with the result is done on the first rank only."""


def latents(call: Call) -> list[torch.Tensor]:
    return call["x"] if isinstance(call["x"], list) else [call["x"]]


def later(call: Call, amount: float = 0.3) -> Call:
    """The same call a step later: other latents, the rest unchanged."""
    generator = torch.Generator().manual_seed(99)
    moved = [tensor + amount * torch.randn(tensor.shape, generator=generator) for tensor in latents(call)]
    return {**call, "x": moved if isinstance(call["x"], list) else moved[0]}


def make(function, call: Call, options: dict[str, Any]) -> Any:
    """A call the way ComfyUI's BaseModel makes it."""
    rest = copy.deepcopy(call)
    return function(rest.pop("x"), rest.pop("timestep"), **rest, transformer_options=options)


def listed(result: Any) -> Result:
    return list(result) if isinstance(result, (list, tuple)) else [result]


def stock(model: torch.nn.Module, call: Call, options: dict[str, Any] | None = None) -> Result:
    with torch.inference_mode():
        return listed(make(model, call, copy.deepcopy(options or {})))


def error(result: Result, expected: Result) -> float:
    """The largest relative error of any tensor, in the Euclidean norm; infinite for other shapes."""
    if [tensor.shape for tensor in result] != [tensor.shape for tensor in expected]:
        return float("inf")
    pairs = [(one, other) for one, other in zip(result, expected, strict=True) if other.numel()]
    if not all(one.isfinite().all() for one, _ in pairs):
        return float("inf")
    return max(float((one - other).norm() / other.norm()) for one, other in pairs)


def shared(
    model: torch.nn.Module,
    steps: Sequence[Call],
    ring: int = 1,
    ulysses: int = 1,
    batch: int = 1,
    *,
    speeds: Sequence[float] | None = None,
    thresholds: Sequence[float] | None = None,
    exchanged: bool = True,
    whole: bool = False,
    compiled: str | Callable | None = None,
    options: dict[str, Any] | None = None,
    previous: Callable[..., torch.Tensor] | None = None,
    around: Callable[[Runner, int, int], Callable[..., torch.Tensor]] | None = None,
) -> tuple[list[Result], list[bool]]:
    """The results of consecutive steps, and which of them were hits; only the first rank of a replica may have results.

    batch: replicas, each with some of the batch rows. speeds: of the ranks of a replica, for uneven shares. thresholds: of
    the First Block Cache, one a step (None: no cache). exchanged=False leaves the exchange out; whole makes tokens whole
    between blocks. compiled: torch.compile's backend, where blocks are compiled.
    options: more transformer options, of code in them a replica's first rank has all, and the others what
    would travel; previous: the attention override of another pack, of which the same is true; around: what stands in front of
    the runner's override, made from it and the replica's batch rows. One rank runs on ``model`` itself.
    """
    from comfy.ldm.modules.attention import optimized_attention

    from para_core.comfy import calls, lanes, patches

    said: list[str] = []
    size = ring * ulysses
    world = batch * size
    copies = [copy.deepcopy(model) for _ in range(world)] if world > 1 else [model]
    meshes = [mesh for _ in range(batch) for mesh in fake_meshes(ring, ulysses)] if world > 1 else [SOLO_MESH]
    everyone = fake_comms(world) if batch > 1 else [mesh.sequence for mesh in meshes]
    options = options or {}
    previous = previous or options.get(OVERRIDE)
    whole = whole or patches.mixes(options)

    def work(rank: int) -> tuple[list[Any], list[bool]]:
        mine = copies[rank]
        mesh = replace_fields(meshes[rank], speeds=tuple(speeds[:size]) if speeds and size > 1 else None)
        plan = plan_for(mine)
        assert plan is not None
        first = rank % size == 0
        foreign = previous is not None and plan.gatherable and size > 1
        chooser = Chooser(None, previous if first or not foreign else None)
        runner = Runner(plan, mine, chooser, cached=thresholds is not None, foreign=foreign, shared=world > 1)
        if compiled is not None:
            runner.override.stock = optimized_attention
            runner.compiled = CompiledBlocks(runner.hooks, runner.override, OVERRIDE, said.append, backend=compiled)
        together = patches.Together(runner.hooks)
        entry, names = getattr(mine, calls.entry(mine)), calls.names(mine)
        step: Step | None = None

        def run(*args, **kwargs):
            result = runner.run(entry, names, args, kwargs, mesh=mesh, step=step, comm=everyone[rank], whole=whole)
            if result is None:
                raise NoResult
            return result

        undo = replace(mine, calls.entry(mine), run)
        results: list[Any] = []
        hits = []
        try:
            for index, call in enumerate(steps):
                rows = latents(call)[0].shape[0]
                start, stop = (sum(balanced(rows, batch)[: rank // size + more]) for more in (0, 1))
                if thresholds is not None:
                    keys = list(range(rows))  # as many conditions as rows
                    step = Step(10.0 - index, thresholds[index], chunks(keys, 1, start, stop), rows, index > 0, index > 0, 0)
                override = {OVERRIDE: around(runner, start, stop) if around else runner.override} if exchanged else {}
                rest = copy.deepcopy(call)
                stock_call = calls.ModelCall(lanes.Call((rest.pop("x"), rest.pop("timestep")), rest), names)
                given = copy.deepcopy(options)
                own = together.lead(given) if first else together.follow(calls.travelling(given), patches.marks(given))
                args, kwargs = stock_call.part(start, stop, {**own, **override})
                try:
                    results.append(mine(*args, **kwargs))
                except NoResult:
                    results.append(None)
                hits.append(runner.cache is not None and runner.cache.hit)
        finally:
            undo()
            runner.remove()
        return results, hits

    comms = [*everyone, *(comm for mesh in meshes for comm in (mesh.sequence, mesh.ulysses, mesh.ring))] if world > 1 else []
    found = on_ranks(world, work, comms)
    assert not said, said  # else blocks ran as they are
    hits = found[0][1]
    assert all(theirs == hits for _, theirs in found)
    assert all(result is None for rank, (results, _) in enumerate(found) if rank % size for result in results)
    replicas = [[listed(result) for result in results] for results, _ in found[::size]]
    return [[torch.cat(rows) if batch > 1 else rows[0] for rows in zip(*parts, strict=True)] for parts in zip(*replicas, strict=True)], hits
