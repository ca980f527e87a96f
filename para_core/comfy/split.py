"""A sampling run's use of the sidecar group: joining, sending steps, collecting results."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.sampler_helpers
import torch

from ..cache.first_block import Step, chunks
from ..execution import gain, memory
from ..execution.ways import Machine
from ..group.codec import Untransportable
from ..group.flights import AHEAD
from ..group.group import GroupError
from ..group.member import RankLost
from ..plans.plan import Plan, attribute, patch_sides
from ..sequence.degrees import choose
from ..sequence.layout import balanced
from ..sequence.mesh import Degrees, Link, replica_speeds
from . import calls, files, objects, patches, sidecars
from .calls import ModelCall
from .estimate import Estimate
from .lanes import separate
from .model import Unshareable
from .steps import told

if TYPE_CHECKING:
    from .session import Session

MATRICES = 2**28  # bytes that measuring how fast a GPU multiplies takes, at most
Share = tuple[int, int, int]  # a replica's call, and its first and last batch row there


class Obstacle(RuntimeError):
    """Why a step cannot be shared."""


class Split:
    """``active`` from the moment the model is on every rank until the run ends or a rank is lost."""

    def __init__(self, session: Session, plan: Plan, devices: list[str]):
        self.session, self.plan, self.devices = session, plan, devices
        self.group = sidecars.group()
        self.active = False
        self.used = Degrees()
        self.kernels: dict[str, dict[str, float]] = {}
        """Times of attention kernels that the next step tells the other ranks."""
        self._heads = attribute(session.model, plan.heads) if plan.stacks else 1
        self._degrees: dict[tuple[int, int | None, bool], Degrees] = {}
        self._estimate: Estimate | None = None
        self._working = 0.0  # bytes that a step needs beside the weights
        self._rates: tuple[float, ...] = ()  # of every rank, where GPUs are of several kinds

    # -- joining ------------------------------------------------------------------------------------------------------

    def prepare(self, executor, *args, **kwargs):
        """PREPARE_SAMPLING wrapper: once ComfyUI has loaded the model, the group gets it too."""
        self._estimate = Estimate(args, self.part)
        with self._or_alone():
            self._recruit(*args[1:3])
        result = executor(*args, **kwargs)
        self._estimate.others = result[2]
        if self._estimate.active:
            with self._or_alone():
                self._share_model(args)
        return result

    @contextmanager
    def _or_alone(self) -> Iterator[None]:
        """Around what readies the group: where it fails, this run stays on this rank."""
        with comfy.model_management.cuda_device_context(self.session.patcher.load_device):  # as around sampling, which comes later
            try:
                yield
            except (GroupError, RankLost, Unshareable, Untransportable, torch.OutOfMemoryError) as error:
                full = isinstance(error, torch.OutOfMemoryError)  # beside the model
                reason = "no memory is free to measure how fast GPUs are" if full else error
                self.session.notes.say(f"This run stays on one GPU, because {reason}.")
                self.make_room()

    def _recruit(self, shape: Sequence[int], conds: Mapping[str, Sequence[Any]]) -> None:
        """Have workers start while the model is loaded: none where splitting could not pay, and no more than could take part."""
        assert self.session.parallel is not None and self._estimate is not None
        if self.session.parallel.careful:
            comfy.model_management.free_memory(MATRICES, self.session.patcher.load_device)
            if reason := self._loses(shape):
                self.session.notes.say(reason)
                self._estimate.close()
                return
            rows = shape[0] * sum(map(len, conds.values()))
            most = self.degrees(rows, options=self.session.options["transformer_options"]).world
            self.devices = self.devices[: max(most - 1, len(self.group.members))]  # those that are there stay
            self._degrees.clear()
            if not self.devices:  # one row of a model whose blocks are not cut
                self._estimate.close()
                return
            self.group.expect(self.devices)
        self._compare()

    def _compare(self) -> None:
        """Learn how fast each rank is where GPUs are of several kinds: before the model is loaded, for its room goes by the shares."""
        device = self.session.patcher.load_device
        if not self.plan.stacks or not gain.unlike([device, *map(torch.device, self.devices)]):
            return
        with self.session.meter.open("workers"):
            self.group.form(device, self.devices)
        comfy.model_management.free_memory(MATRICES, device)
        dtype = self.session.patcher.model.get_dtype_inference()
        self._rates = (gain.matrix_rate(device, dtype), *self.group.rates(dtype))

    def _speeds(self, degrees: Degrees) -> tuple[float, ...] | None:
        """Of all ranks of ``degrees``, where shares go by speed."""
        return gain.speeds(self._rates, degrees, self._heads) if self._rates else None

    def _share_model(self, args: tuple) -> None:
        session = self.session
        with session.meter.open("workers"):
            self.group.form(session.patcher.load_device, self.devices)
        self._working = comfy.sampler_helpers.estimate_memory(*args[:3])[0]
        if session.parallel is not None and session.parallel.careful and (reason := self._loses(args[1], self.group.link)):
            session.notes.say(reason)
            self.make_room()
            return
        assert session.runner is not None
        if processors_of_their_own(session.patcher.load_device):
            self.group.link()  # finds out where messages do not arrive; weights would be waited for without end
        session.runner.override.ways.machine = self._machine()
        self.group.measure(session.meter.exchanged)
        with session.meter.open("model"):
            sidecars.load(session.patcher, self._working)
        self.group.begin(
            model=sidecars.model_id(session.patcher),
            attention=session.attention.backend if session.attention else None,
            kernels=session.chooser.timings.table if session.chooser is not None else {},
            cached=session.runner is not None and session.runner.cache is not None,
            compiled=session.runner is not None and session.runner.compiled is not None,
            foreign=bool(session.foreign),
        )
        self.active = True

    def part(self, shape: Sequence[int]) -> float:
        """The part of a whole step's memory that a card of this run needs for latents of ``shape`` (B, C, ...), at most.

        Conditions that ComfyUI asks about together may run together, one by one, or side by side in lanes.
        """
        assert self._estimate is not None
        options, rows = self.session.options["transformer_options"], shape[0]
        if calls.first_patch(options) or self.session.foreign:
            return 1.0  # what runs there is given the tokens of all ranks
        single = min(rows, self._estimate.rows)
        separable = {rows: rows, single: single} if self.plan.coupled is None else {rows: 1, single: 1}
        amounts = [self._amount(self.degrees(apart, options=options), together, shape) for together, apart in separable.items()]
        if self.session.guided:
            lanes = range(2, self._estimate.conditions + 1)
            amounts += [single * self._amount(self.degrees(width, options=options), 1, shape) for width in lanes]
        return min(1.0, max(amounts) / rows)

    def _amount(self, degrees: Degrees, rows: int, shape: Sequence[int]) -> float:
        """Memory that a card of ``degrees`` needs for ``rows`` like those of latents of ``shape``, in whole forwards of one."""
        outside = self.plan.held_outside(self.session.model) if self.plan.stacks else 1.0
        share = -(-rows // degrees.batch)
        if outside == 1.0:
            return share
        sides = (*(1 for _ in shape[4:]), shape[-2], 1)  # some families cut between rows of the picture, none finer
        pieces = image_tokens(self.plan, self.session.model, sides)
        replicas = {replica_speeds(self._speeds(degrees), degrees, replica) for replica in range(degrees.batch)}
        return share * max(memory.part(degrees, pieces, self._heads, outside, speeds) for speeds in replicas)

    def make_room(self) -> None:
        """Have ComfyUI make room for whole steps on this card."""
        if self._estimate is not None:
            self._estimate.whole()

    def _loses(self, shape: Sequence[int], link: Callable[[], Link] | None = None) -> str:
        """Why sampling latents of ``shape`` ``(B, C, ...)`` would not be faster on several ranks; "" if it should be.

        ``link``: measures it; None, before there are other ranks: the fastest imaginable, and as fast cards.
        """
        model, device = self.session.model, self.session.patcher.load_device
        if not processors_of_their_own(device):
            return "This run is not split: CPU processes share one processor."
        if not self.plan.stacks:
            return ""
        if self.session.foreign:
            return f"This run is not split: the first GPU would compute attention for all, by {self.session.foreign}."
        options = self.session.options["transformer_options"]
        rows = shape[0] * (2 if self.session.guided else 1)
        tokens = image_tokens(self.plan, model, (self.session.shapes or [shape])[0][2:])
        dtype = self.session.patcher.model.get_dtype_inference()
        rate = gain.matrix_rate(device, dtype)
        work, degrees = gain.work_of(self.plan, model, rows, tokens), self.degrees(rows, tokens, options=options)
        shared = gain.reached(work, degrees, self._rates, self._heads) if self._rates else rate
        if link is None and gain.unlike([device, *map(torch.device, self.devices)]):
            shared = gain.FASTER * rate
        figures = work, degrees, rate, link() if link is not None else gain.FASTEST, shared
        compiled = self.session.runner is not None and self.session.runner.compiled is not None
        launching = 0.0 if self.session.graph(options) else gain.COMPILED if compiled else gain.EAGER
        if gain.gain(*figures, launching=launching) > gain.WORTH:
            alone = gain.seconds(work, Degrees(), rate, launching=launching)
            if link is None or self._fetching() * gain.WORTH < alone:
                return ""
            return "This run is not split: a GPU has no room for the whole model, and would fetch weights for longer than a step takes."
        if (times := gain.gain(*figures)) > gain.WORTH:
            return "This run is not split: the GPUs would wait for the processor, which launches a step no faster for several of them."
        slowest = min(self._rates, default=rate)
        slow = f" with a GPU of {slowest / rate:.0%} of the first one's speed" if slowest < gain.UNEQUAL * rate else ""
        where = "on this link between the GPUs" if link is not None else "even on the fastest link between GPUs"
        return f"This run is not split:{slow} {where} a step would take {1 / times:.2g} times as long."

    def _fetching(self) -> float:
        """Seconds of every step in which a card that cannot hold the model fetches its weights; 0 where none does, or this one too."""
        patcher = self.session.patcher
        if files.origin(patcher) is None or files.offloaded(patcher, self._working) or sidecars.fit(patcher, self._working):
            return 0.0
        return patcher.model_size() / gain.FETCHED

    def shares(self) -> list[int] | None:
        """Percent of the tokens of its sequence that each rank had, where that went by speed; else None."""
        found = [replica_speeds(self._speeds(self.used), self.used, replica) for replica in range(self.used.batch)]
        if not any(found):
            return None
        replicas = [speeds or (1.0,) * self.used.sequence for speeds in found]
        return [round(100 * speed / sum(speeds)) for speeds in replicas for speed in speeds]

    def _machine(self) -> Machine | None:
        """The measured link and memory that the exchange is planned by; None where it goes as it is."""
        device = self.session.patcher.load_device
        if not processors_of_their_own(device) or not self.plan.stacks or self.session.foreign:
            return None
        runner, dtype = self.session.runner, self.session.patcher.model.get_dtype_inference()
        compiled = runner is not None and runner.compiled is not None  # only then something is computed beside messages
        matrices = gain.matrix_rate(device, dtype) if compiled else math.inf
        return Machine(self.group.link(), gain.memory_rate(device), matrices)

    def lost(self) -> int:
        """How many of the last results that the sampler was given may never be there."""
        with suppress(RankLost):
            self.group.land()
        return self.group.under_way

    def stop(self) -> None:
        """The group is of no more use to this run."""
        self.active = False
        self.group.measure(None)
        self.group.end()
        self.session.notes.relay(self.group.sayings())
        if self._estimate is not None:
            self._estimate.close()

    def degrees(
        self, rows: int, tokens: int | None = None, say: Callable[[str], None] = lambda _sentence: None, *, options: dict[str, Any]
    ) -> Degrees:
        """Degrees for a step of ``rows`` batch rows, its shortest segment of ``tokens``; ``say`` hears what had to be changed.

        Code of other nodes in ``options`` runs on the first rank and may look at the whole batch, which is not split then.
        """
        assert self.session.runner is not None
        code = calls.first_patch(options) or self.session.foreign
        ranks = 1 + len(self.devices)  # also before the group is there
        key = (rows, tokens, bool(code))
        if key not in self._degrees:
            asked = self.session.parallel
            assert asked is not None
            if code and asked.batch_degree > 1:
                say(f"The batch is not split, because {code} may look at all of it.")
                asked = replace(asked, batch_degree=1, ring_degree=0, ulysses_degree=0)
            self._degrees[key], note = choose(
                ranks,
                batch=1 if code else asked.batch_degree or (0 if self.plan.stacks else min(rows, ranks)),
                ring=asked.ring_degree if self.plan.stacks else 1,
                ulysses=asked.ulysses_degree if self.plan.stacks else 1,
                rows=rows,
                heads=self._heads,
                tokens=tokens,
                log_sum_exp=self.session.runner.override.chooser.has_lse,
            )
            say(note)
        return self._degrees[key]

    # -- steps --------------------------------------------------------------------------------------------------------

    def conditions(self, executor, model, conds, x_in, timestep, model_options):
        """CALC_COND_BATCH wrapper: conditions that ComfyUI would run one after the other get lanes.

        Not under other nodes' wrappers of a model call: one that replaces something for the time of the call would be
        entered twice before it is left, and put back the wrong thing.
        """
        options = model_options.get("transformer_options", {})
        several = self.active and sum(map(bool, conds)) > 1 and not calls.wrapped(model_options)
        lanes = separate(conds, x_in, timestep) if several else []
        if len(lanes) < 2 or self.degrees(len(lanes), options=options).batch < 2:
            return executor(model, conds, x_in, timestep, model_options)
        functions = [
            lambda own=own: executor(
                model, [cond if index in own else None for index, cond in enumerate(conds)], x_in, timestep, model_options
            )
            for own in lanes
        ]
        results = self.session.lanes.run(functions, self.session.step, self.degrees(len(lanes), options=options).batch)
        merged = list(results[0])
        for own, result in zip(lanes, results, strict=True):
            for index in own:
                merged[index] = result[index]
        return merged

    def step(self, model_calls: list[ModelCall]) -> list[Any]:
        """Results of ``model_calls``, computed by the group.

        Raises RankLost if it broke down, Obstacle or Untransportable if the calls hold what only this process has.
        """
        session, group, runner = self.session, self.group, self.session.runner
        assert runner is not None
        options = model_calls[0].options  # lanes have no code in theirs
        for call in model_calls:
            if reason := calls.refusal(call.options):
                raise Obstacle(reason)
        if session.swapped:
            raise Obstacle(f"{session.swapped} {objects.ELSEWHERE}")
        if code := calls.first_patch(options):
            session.notes.say(f"Tokens are brought to the first GPU at every call of {code}, which runs there: that takes time.")
        rows = len(model_calls) if len(model_calls) > 1 else separable(self.plan, model_calls[0])
        tokens = min(shortest(self.plan, session.model, call) for call in model_calls) if self.plan.stacks else None
        degrees = self.degrees(rows, tokens, session.notes.say, options=options)
        shares = share(model_calls, degrees.batch)
        degrees = replace(degrees, batch=len(shares))
        self._covered(model_calls[0], degrees, shares[0][2] - shares[0][1])
        steps, shapes = self._cache_steps(model_calls, shares, degrees)
        graph, whole = session.graph(options), patches.mixes(options)
        parts = [model_calls[index].part(start, stop, calls.travelling(model_calls[index].options)) for index, start, stop in shares]
        parts = [calls.without(part, session.names, self.plan.rebuilt) for part in parts]
        ways = runner.override.ways.decide()
        alike = {"graph": graph, "kernels": self.kernels, "ways": ways, "patches": patches.marks(options), "whole": whole}
        order: dict[str, Any] = {
            "degrees": [degrees.batch, degrees.ring, degrees.ulysses],
            "shares": [{**alike, "part": part, "cache": told(step)} for part, step in zip(parts, steps, strict=True)],
        }
        if (speeds := self._speeds(degrees)) is not None:
            order["speeds"] = list(speeds)
        self.kernels = {}
        index, start, stop = shares[0]
        args, kwargs = model_calls[index].part(start, stop, patches.Together(runner.hooks).lead(model_calls[index].options))
        ahead = session.ahead is not None and session.ahead.ready(model_calls)
        group.land(AHEAD)
        comfy.model_management.throw_exception_if_processing_interrupted()
        with uninterrupted(), group.step(order, lambda: ahead and runner.settled) as (mesh, comm):
            first = runner.run(
                session.original, session.names, args, kwargs, mesh=mesh, step=steps[0], comm=comm, graph=graph, whole=whole, ahead=ahead
            )
            results = [first]
            for replica, (index, start, stop) in enumerate(shares[1:], start=1):
                results.append(self._collect(replica * degrees.sequence, first, model_calls[index].latents, stop - start))
        session.notes.relay(group.sayings())
        session.forwards += len(model_calls)
        self.used = max(self.used, degrees, key=lambda known: known.world)
        comfy.model_management.throw_exception_if_processing_interrupted()
        session.record(shapes, model_calls[0])
        if len(model_calls) > 1 or len(results) == 1:
            return results
        joined = [torch.cat(rows) for rows in zip(*map(calls.tensors, results), strict=True)]
        return [joined[0] if isinstance(first, torch.Tensor) else joined]

    def _covered(self, call: ModelCall, degrees: Degrees, rows: int) -> None:
        """Make room where this rank's ``rows`` of ``call`` need more than ComfyUI was told, as with fewer text tokens than ranks."""
        shape = call.latents[0].shape
        if self._estimate is not None and self._estimate.active and (told := self.part(shape)) < 1.0:
            whole = bool(calls.first_patch(call.options))
            if (rows if whole else self._amount(replace(degrees, batch=1), rows, shape)) > told * shape[0] + 1e-6:
                self.make_room()

    def _collect(self, rank: int, first: Any, latents: list[torch.Tensor], rows: int) -> Any:
        """What ``rank`` computed for ``rows`` rows of ``latents``, in the form of this rank's own result ``first``."""
        own = calls.tensors(first)
        sides = [(rows, tensor.shape[1], *latent.shape[2:]) for tensor, latent in zip(own, latents, strict=True)]
        sizes = [math.prod(side) for side in sides]
        flat = self.group.collect(rank, own[0].new_empty(sum(sizes)))
        results = [piece.view(side) for piece, side in zip(flat.split(sizes), sides, strict=True)]
        return results[0] if isinstance(first, torch.Tensor) else results

    def _cache_steps(
        self, model_calls: list[ModelCall], shares: list[Share], degrees: Degrees
    ) -> tuple[list[Step | None], dict[Hashable, Hashable]]:
        """Each replica's cache step, and the shape by condition: it names who computes which of its rows."""
        if not self.session.follows(model_calls[0].options):
            return [None] * len(shares), {}
        offsets = [sum(call.chunks for call in model_calls[:index]) for index in range(len(model_calls))]
        owned = []
        for index, start, stop in shares:
            call = model_calls[index]
            owned.append(chunks(call.keys, call.rows // call.chunks, start, stop, offsets[index]))
        shapes: dict[Hashable, Hashable] = {}
        for call in model_calls:
            for key in call.keys:
                rows = [sum(chunk.stop - chunk.start for chunk in own if chunk.key == key) for own in owned]
                shapes[key] = (call.shape, degrees, tuple(rows))
        return [self.session.cache_step(shapes, model_calls[0], own) for own in owned], shapes


def processors_of_their_own(device: torch.device) -> bool:
    """Whether ranks beside ``device`` compute on hardware of their own."""
    return device.type == "cuda"


def image_tokens(plan: Plan, model: torch.nn.Module, sides: Sequence[int]) -> int:
    """Tokens of an image or a video of these latent ``sides``."""
    return math.prod(-(-side // size) for side, size in zip(sides, patch_sides(plan, model, len(sides)), strict=True))


def shortest(plan: Plan, model: torch.nn.Module, call: ModelCall) -> int:
    """Length of the shortest segment of a call; references and the like, which make the image's longer, are not counted."""
    found = [image_tokens(plan, model, call.latents[0].shape[2:])]
    if plan.text is not None and (text := call.arguments.get(plan.text)) is not None:
        found.append(text.shape[1])
    if plan.fewest is not None:
        found.append(plan.fewest(model, call.latents, call.arguments.get) or found[0])
    return min(found)


def separable(plan: Plan, call: ModelCall) -> int:
    """Batch rows of a call that different ranks may compute."""
    return 1 if call.rows > 1 and plan.coupled is not None and plan.coupled(call.arguments.get) else call.rows


def share(model_calls: list[ModelCall], replicas: int) -> list[Share]:
    """Who computes what: one call's rows evenly, or a call each."""
    if len(model_calls) > 1:
        return [(index, 0, call.rows) for index, call in enumerate(model_calls)]
    ends = [0]
    for rows in balanced(model_calls[0].rows, replicas):
        ends.append(ends[-1] + rows)
    return [(0, start, stop) for start, stop in itertools.pairwise(ends)]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Keep ComfyUI's cancel check from firing in the middle of a shared forward, where other ranks would be left waiting.

    The one place where a function of ComfyUI is replaced; the caller checks right after the forward.
    """
    check = comfy.model_management.throw_exception_if_processing_interrupted
    comfy.model_management.throw_exception_if_processing_interrupted = lambda: None
    try:
        yield
    finally:
        comfy.model_management.throw_exception_if_processing_interrupted = check
