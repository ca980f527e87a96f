"""One sampling run: reads what the nodes attached, installs what it needs, and leaves nothing behind."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.samplers
import folder_paths
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ..attention.choice import Chooser
from ..attention.timings import Timings
from ..cache.first_block import Step, chunks
from ..cache.predictor import ORDERS
from ..cache.rule import Decisions, Window
from ..execution.override import AttentionOverride
from ..execution.runner import KernelBroken, Runner
from ..group.codec import Untransportable
from ..group.member import RankLost
from ..log import log
from ..plans import PlanError, plan_for
from ..sequence.replace import replace
from ..sequence.solo import SOLO_MESH
from ..settings import Attention, Cache, Compile, Parallel
from . import accelerate, ahead, calls, compiling, numbers, objects, reports, resident, sidecars, static, windows
from .ahead import Overtaken
from .calls import ModelCall
from .forecasting import Forecaster, foreseen
from .lanes import Call, Lanes
from .meter import Meter
from .notify import Notes, show
from .split import Obstacle, Split
from .wording import live, summary

KEY = "paradit"


def sample(executor, *args, **kwargs):
    """OUTER_SAMPLE wrapper of every model that carries our settings."""
    if comfy.model_management.in_training:  # needs gradients, and every step
        Notes().say("ParaDiT's nodes do nothing here, because this run trains: they are for sampling.")
        return executor(*args, **kwargs)
    sampler, steps = (args[2], len(args[3]) - 1) if len(args) > 3 else (None, 0)
    session = Session(executor.class_obj, sampler=sampler, steps=steps, shapes=kwargs.get("latent_shapes"))
    try:
        session.open()
        result = executor(*session.listening(args), **kwargs)
        session.finish(result)
        return result
    finally:
        session.close()


class Session:
    """The state of one run on rank 0: settings, hooks, decisions of the cache, the split, and what to report."""

    def __init__(self, guider: comfy.samplers.CFGGuider, *, sampler: Any, steps: int, shapes: Sequence[Sequence[int]] | None = None):
        self.guider, self.patcher = guider, guider.model_patcher
        self.options: dict[str, Any] = guider.model_options
        self.notes = Notes()
        self.guided = guided(guider)
        settings = accelerate.fill(self.options.get(KEY, {}), self.patcher, steps=steps, say=self.notes.say)
        self.earlier: list[str] = settings.get("notes", [])
        self.parallel: Parallel | None = settings.get("Parallel")
        self.attention: Attention | None = settings.get("Attention")
        self.caching: Cache | None = settings.get("Cache")
        self.compiling: Compile = settings.get("Compile", Compile("off"))
        objects.settle(self.patcher)
        if compiling.settled(self.compiling, self.patcher, self.options.get("transformer_options", {})):
            self.patcher = static.copy(self.patcher, self.notes.say)
            objects.settle(self.patcher)
        self.model: torch.nn.Module = self.patcher.model.diffusion_model
        self.names = calls.names(self.model)
        self.evaluation, self.lanes = calls.Evaluation(), Lanes()
        self.split: Split | None = None
        self.ahead: ahead.Ahead | None = None
        self.runner: Runner | None = None
        self.decisions: Decisions | None = None
        self.forecaster: Forecaster | None = None
        self.chooser: Chooser | None = None
        self.foreign = ""  # another node's attention override, which shared forwards use
        self.swapped = ""  # what other code has put into the model for this step
        self.sampler, self.steps, self.forwards = sampler, steps, 0
        self.shapes = shapes  # of the latents, which are one long row where there are several
        self.meter = Meter(self.patcher.load_device)
        self.latents: reports.Mark | None = None
        self._undo: list = []

    # -- opening and closing ------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Install what the settings ask for and the model allows; say why where it does not."""
        for sentence in self.earlier:
            self.notes.say(sentence)
        if self.guider.model_patcher is not self.patcher:
            self._undo.append(partial(setattr, self.guider, "model_patcher", self.guider.model_patcher))
            self.guider.model_patcher = self.patcher
        options = self.options.setdefault("transformer_options", {})
        previous = options.get(calls.OVERRIDE)
        backend = self.attention.backend if self.attention else None
        self.chooser = chooser = Chooser(backend, previous, say=self.notes.say, timings=remembered(self.patcher.load_device))
        caching = self.caching is not None and self.caching.threshold > 0 and self.caching.max_consecutive_hits != 0
        if caching and self.caching is not None and (why := self.caching.never() or windows.moving(self.options)):
            self.notes.say(f"No step is cached: {why}.")
            caching = False
        devices = sidecars.devices(self.parallel, self.patcher.load_device, self.notes.say) if self.parallel else []
        if devices:
            reason = calls.unsplittable(self.patcher, options, previous)
            if not reason and (code := objects.replaced(self.model)):
                reason = f"{code} {objects.ELSEWHERE}"
            self.foreign = f"the attention override {calls.title(previous)}" if previous is not None and not reason else ""
            if reason:
                self.notes.say(f"This run stays on one GPU: {reason}.")
                devices = []
        if caching and self.caching is not None and self.caching.rule == "forecast":
            caching, sampling = False, self.patcher.get_model_object("model_sampling")
            if isinstance(own := foreseen(sampling, self.sampler), str):
                self.notes.say(f"No step is cached: {own}.")
            else:
                self.decisions = self._decisions(self.caching)
                self.forecaster = Forecaster(self.decisions, own, float(sampling.sigma_max))
        if caching or devices or self.compiling.mode != "off":
            self._install(chooser, caching, devices)
        if self.runner is not None or self.attention is not None:
            options[calls.OVERRIDE] = self.runner.override if self.runner is not None else AttentionOverride(chooser, None)
        # also where nothing else is ours: then the forwards are only timed
        forward: Callable = self.forward
        if calls.compiled_elsewhere(options):
            if not self.used:
                return
            self.notes.say("What Torch Compile Model compiles runs uncompiled here; the node Compile Blocks does it with this pack.")
            forward = torch.compiler.disable(self.forward_uncompiled)
        self.original = getattr(self.model, calls.entry(self.model))
        self._undo.append(replace(self.model, calls.entry(self.model), forward))
        if self.used:
            self._wrap(WrappersMP.SAMPLER_SAMPLE, partial(self.loaded, forward))

    @property
    def used(self) -> bool:
        """Whether anything of this run is ours."""
        return self.runner is not None or self.attention is not None or self.forecaster is not None

    def _decisions(self, caching: Cache) -> Decisions:
        sampling = self.patcher.get_model_object("model_sampling")
        start, end = (float(sampling.percent_to_sigma(percent)) for percent in (caching.start_percent, caching.end_percent))
        return Decisions(caching, Window(start, end))

    def _install(self, chooser: Chooser, caching: bool, devices: list[str]) -> None:
        plan = plan_for(self.model)
        if plan is None:
            what = f"ParaDiT does not know the model {type(self.model).__name__}"
            if calls.compiled(self.model):
                what = "Another node compiles the whole model (use Compile Blocks in its place)"
            self.notes.say(f"{what}: it runs on one GPU, and its blocks as they are.")
            return
        if not plan.stacks and caching:
            name = type(self.model).__name__
            self.notes.say(f"No step is cached: the rule classic does not know the blocks of {name}; forecast works there too.")
            caching = False
        try:
            method = objects.block_method(self.patcher, plan)
            if method and (caching or self.compiling.blocks):
                self.notes.say(f"The rule classic and compiled blocks are left out, because of {method}; forecast works with it.")
                caching = False
            self.runner = Runner(
                plan,
                self.model,
                chooser,
                cached=caching,
                compiled=not method and self._compiles(),
                stock=optimized_attention,
                foreign=bool(self.foreign),
                shared=bool(devices),
            )
        except PlanError as error:
            self.notes.say(f"{error}: it runs on one GPU, and its blocks as they are.")
            return
        self._undo.append(self.runner.remove)
        if caching:
            assert self.caching is not None
            self.decisions = self._decisions(self.caching)
        if devices:
            if not plan.stacks:
                name = type(self.model).__name__
                self.notes.say(f"Of {name}, prompts and images of a batch run on several GPUs; one image of one prompt runs on one.")
            if self.foreign:
                self.notes.say(f"Attention is computed on the first GPU alone, by {self.foreign}: without that node all GPUs share it.")
            self.split = Split(self, plan, devices)
            self._undo.insert(0, self.split.stop)  # last: until captures have gone, a communicator that was lost does not end
            for place, wrapper in ((WrappersMP.PREPARE_SAMPLING, self.split.prepare), (WrappersMP.CALC_COND_BATCH, self.split.conditions)):
                self._wrap(place, wrapper)
            self.ahead = ahead.begin(self.guider, self.sampler, self.steps, KEY) if not caching and not self.foreign else None

    def _wrap(self, place: str, wrapper: Callable) -> None:
        """Have ComfyUI call ``wrapper`` at that place of the run."""
        add_wrapper_with_key(place, KEY, wrapper, self.options, is_model_options=True)
        self._undo.append(partial(self.options["transformer_options"]["wrappers"][place].pop, KEY, None))

    def loaded(self, forward: Callable, executor, guider, *args, **kwargs):
        """SAMPLER_SAMPLE wrapper: model and conditions have been prepared for this run, the first step comes next."""
        setattr(self.model, calls.entry(self.model), forward)  # loading puts in a node's own
        resident.keep(guider.conds, self.patcher.load_device)
        if self.ahead is None:
            return executor(guider, *args, **kwargs)
        return self.ahead.sample(partial(executor, guider, **kwargs), args, self.land)

    def land(self) -> None:
        """Wait for results that the sampler has been given ahead. Raises Overtaken if they are lost."""
        if self.split is not None and self.split.active:
            try:
                self.split.group.land()
            except RankLost as lost:
                self.give_up(alone(lost))

    def _compiles(self) -> bool:
        """Whether blocks are compiled in this run; what stands against it is said."""
        code = self.compiling.blocks and (calls.first_patch(self.options["transformer_options"]) or self.foreign)
        if code:
            self.notes.say(f"Blocks are not compiled: {code} runs inside of them.")
        return self.compiling.blocks and not code

    def graph(self, options: dict[str, Any]) -> bool:
        """Whether forwards with these options are captured as CUDA graphs; what stands against it is said."""
        if not self.compiling.graph or self.runner is None:
            return False
        assert self.chooser is not None
        if reason := compiling.against_graphs(self.patcher, self.chooser, self.swapped or self.written):
            self.notes.say(reason)
            return False
        if code := calls.first_patch(options):
            self.notes.say(f"No CUDA graphs where {code} runs: a graph repeats kernels, not code.")
        return not code

    @cached_property
    def written(self) -> str:
        """What other packs have written into the model for good."""
        return objects.foreign(self.model)

    def listening(self, args: tuple) -> tuple:
        """The sampler's arguments with a callback (the sixth) that also tells the node how far the run is."""
        if len(args) < 6:
            return args
        callback = args[5]

        def told(step: int, denoised: Any, x: Any, total: int) -> Any:
            ranks = self.split.used.world if self.split is not None else 1
            self.notes.live(lambda: live(step + 1, total, self.meter.seconds, ranks, self.cached()))
            return callback(step, denoised, x, total) if callback is not None else None

        return (*args[:5], told, *args[6:])

    def cached(self) -> int | None:
        """Forwards that the cache has skipped so far; None without a cache."""
        return sum(record.hit for record in self.decisions.records) if self.decisions is not None else None

    def finish(self, result: torch.Tensor) -> None:
        """Sampling has ended well with these latents. Waits for the device, as whoever takes them would."""
        self.latents = reports.mark(result)
        self.meter.stop()

    def close(self) -> None:
        """Undo everything, in reverse order, write the run's lines to the log, and keep the report of latents that were made."""
        while self._undo:
            self._undo.pop()()
        report = numbers.report(self)
        self.split = None  # which knows this session: nothing may keep the patcher, not even until Python looks for circles
        if self.used:
            log.info("%s: %s", report["model"], summary(report))
            log.info("run: %s", json.dumps(report))
            show("\n".join([summary(report), *self.notes.said]))
        if self.latents is not None:
            reports.keep(report, self.latents)

    # -- the model's forward ------------------------------------------------------------------------------------------

    def forward(self, *args, **kwargs):
        """Stands for the diffusion model's entry method during the run."""
        call = Call(args, kwargs)
        lane = self.lanes.current()
        return lane.ask(call) if lane is not None else self.step([call])[0]

    def forward_uncompiled(self, *args, **kwargs):
        """The same where another node compiles the model or its blocks: hooks and collectives cannot be traced."""
        with calls.uncompiled(self.model):
            return self.forward(*args, **kwargs)

    def step(self, together: list[Call]) -> list[Any]:
        """Results of model calls that stock code makes one after the other and that may be computed at once."""
        strengths = calls.hooked(self.patcher)
        model_calls = [ModelCall(call, self.names, strengths) for call in together]
        if self.runner is not None:
            self.swapped = objects.swapped(self.model, self.runner.hooks.stacks + self.runner.hooks.sides)
        if self.ahead is not None and (known := self.ahead.answer(model_calls)) is not None:
            return known
        if self.forecaster is not None:
            self.land()  # before what may be lost is foretold from
        if self.decisions is not None:
            self.evaluation.count(model_calls)
        records = self.decisions.records if self.decisions is not None else []
        with self.meter.visit(model_calls[0].options.get("sigmas"), len(together), records) as visit:
            results = self.forecaster.answer(model_calls) if self.forecaster is not None else None
            if results is not None:
                self.forwards += len(model_calls)
            else:
                results = self.compute(model_calls)
                if self.forecaster is not None:
                    self.forecaster.learn(model_calls, results)
            visit.whole = self.runner is None or not self.runner.graphs.captures
        if self.ahead is not None and self.split is not None and self.split.active:
            self.ahead.keep(model_calls, results)
        return results

    def compute(self, model_calls: list[ModelCall]) -> list[Any]:
        """Results of calls that are made together: by the group, or alone where there is none or it breaks down."""
        if self.split is not None and self.split.active:
            try:
                results = self.split.step(model_calls)
                self.time_kernels(self.split)
                return results
            except RankLost as lost:
                reason = alone(lost)
            except (KernelBroken, Obstacle, Untransportable) as error:
                reason = f"The rest of this run is computed on one GPU: {error}."
            # out here, the failed step's frames no longer hold its memory
            self.give_up(reason)
        results = [self.sound(call) for call in model_calls]
        self.time_kernels()
        return results

    def time_kernels(self, split: Split | None = None) -> None:
        """Between two forwards: time attention kernels for the kinds of call that were new, and let the other ranks know."""
        if self.chooser is not None and self.chooser.timings.pending:
            kinds = (self.runner or self.chooser).measure(self.patcher.load_device)
            self.meter.unsettled = bool(kinds)
            if split is not None:
                split.kernels = {kind: self.chooser.timings.table[kind] for kind in kinds}

    def give_up(self, reason: str) -> None:
        """Go on with one rank: the cache starts cold, and ComfyUI is asked for the memory of whole steps.

        Raises Overtaken if the sampler has used results that are lost.
        """
        assert self.split is not None and self.runner is not None
        self.notes.say(reason)
        lost = self.split.lost()
        self.runner.graphs.drop()  # they hold the memory of shared steps, and the communicator, whose end ``stop`` waits for
        self.split.stop()
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.forget()
        self.split.make_room()
        if lost:
            assert self.ahead is not None
            self.ahead.forget(lost)
            if self.forecaster is not None:
                self.forecaster.forget()
            raise Overtaken

    def forget(self) -> None:
        """The cache starts cold."""
        if self.decisions is not None and self.runner is not None and self.runner.cache is not None:
            self.decisions.forget()
            self.runner.cache.forget()

    def sound(self, call: ModelCall) -> Any:
        """``alone``, and once more if an attention kernel broke and was replaced."""
        try:
            return self.alone(call)
        except KernelBroken:
            self.forget()
            return self.alone(call)

    def alone(self, call: ModelCall) -> Any:
        """One call on this rank, through the cache if there is one."""
        self.forwards += 1
        if self.runner is None:
            return self.plain(call)
        graph = self.graph(call.options)
        if not self.follows(call.options):
            return self.runner.run(self.original, self.names, call.call.args, call.call.kwargs, mesh=SOLO_MESH, graph=graph)
        shapes = dict.fromkeys(call.keys, call.shape)
        step = self.cache_step(shapes, call, chunks(call.keys, call.rows // call.chunks, 0, call.rows))
        args, kwargs = call.call.args, call.call.kwargs
        result = self.runner.run(self.original, self.names, args, kwargs, mesh=SOLO_MESH, step=step, graph=graph)
        self.record(shapes, call)
        return result

    def plain(self, call: ModelCall) -> Any:
        """One call of a model whose blocks are left alone: only its attention is ours, or nothing."""
        assert self.chooser is not None
        self.chooser.begin_forward()
        result = self.original(*call.call.args, **call.call.kwargs)
        if not self.chooser.end_forward():
            raise KernelBroken("an attention kernel gave NaN or infinity")
        return result

    def follows(self, options: dict[str, Any]) -> bool:
        """Whether calls with these options go through the cache; what stands against it is said."""
        cached = self.runner is not None and self.runner.cache is not None
        code = (calls.uncached(options) or self.swapped) if cached else ""
        if code:
            self.notes.say(f"First Block Cache does not skip anything with {code}: its first block does not show what that changes.")
        return cached and not code

    def cache_step(self, shapes: dict[Hashable, Hashable], call: ModelCall, own: tuple) -> Step | None:
        """What the cache shall do in a step of these conditions; ``own``: the chunks of this rank's forward."""
        if self.decisions is None or self.forecaster is not None:
            return None
        settings, window = self.decisions.settings, self.decisions.window
        compare = self.decisions.known(shapes)
        may_hit = compare and self.decisions.may_hit(shapes)
        return Step(call.level, settings.threshold, own, len(shapes), compare, may_hit, ORDERS[settings.predictor], window)

    def record(self, shapes: dict[Hashable, Hashable], call: ModelCall) -> None:
        """Keep what the cache did in the step that has just run."""
        if shapes and self.decisions is not None and self.runner is not None and self.runner.cache is not None:
            self.decisions.record(shapes, call.sigma, self.runner.cache.changes, self.runner.cache.hit)


def alone(lost: RankLost) -> str:
    """What the user is told when the group has broken down."""
    return f"The rest of this run is computed on one GPU, because {lost}; the next prompt uses the whole group again."


def guided(guider: comfy.samplers.CFGGuider) -> bool:
    """Whether steps have more conditions than the prompt. Guiders may keep a schedule instead of one number, or two of their own."""
    if len(getattr(guider, "original_conds", ())) > 2:
        return True
    cfg = getattr(guider, "cfg", 1.0)
    try:
        return not math.isclose(float(cfg), 1.0)
    except (TypeError, ValueError):
        return True


def remembered(device: torch.device) -> Timings:
    """Times of attention kernels on ``device``, kept in the folder of ComfyUI's user files."""
    if device.type != "cuda":
        return Timings()
    timings = Timings(Path(folder_paths.get_user_directory()) / "paradit" / "attention-kernels.json")
    timings.load(device)
    return timings
