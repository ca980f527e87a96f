"""One call of the diffusion model as stock code makes it: its parts, its conditions, and what of it can travel or be split."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY

from ..cache.reading import Reading
from ..execution.override import OVERRIDE
from ..plans import plan_for
from ..sequence.hooks import Arguments
from ..sequence.rows import take
from . import windows
from .lanes import Call

OUTSIDE = ("wrappers", "callbacks", windows.NAME)  # of use outside of the diffusion model, on rank 0 only
HOLDERS = ("easycache",)  # objects of ComfyUI's own wrappers, which no model reads
BEFORE = ("post_input", "noise_refiner")  # patches called before the first block

# Core nodes, by the module of their patches, that cannot be shared: they change from call to call how many tokens there are.
REFUSED = {
    "nodes_flux": "Flux KV Cache drops tokens after the first step and keeps their keys and values",
    "nodes_tomesd": "Token Merging (ToMe) merges tokens inside attention",
    "nodes_hypertile": "HyperTile cuts the image into tiles inside attention",
}
# Core nodes whose patches do the same at every step, or show at the first block: a step without them is as before.
CACHED = ("nodes_nag", "nodes_slg")


def entry(model: torch.nn.Module) -> str:
    """The method that runs inside every other wrapper: ``_forward`` where a family has one, else ``forward``."""
    return "_forward" if hasattr(type(model), "_forward") else "forward"


def names(model: torch.nn.Module) -> list[str]:
    """Positional parameters of the entry method, without self."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    signature = inspect.signature(getattr(type(model), entry(model)))
    return [name for name, parameter in signature.parameters.items() if parameter.kind in kinds][1:]


def tensors(value: Any) -> list[torch.Tensor]:
    """The latent or the result of a model as a list: some work on several latents at once (video and audio)."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def without(call: tuple[tuple, dict[str, Any]], parameters: list[str], paths: Iterable[str]) -> tuple[tuple, dict[str, Any]]:
    """A call's arguments without the entries that ``paths`` name ("argument.key")."""
    arguments = Arguments(parameters, call[0], dict(call[1]))
    for path in paths:
        name, _, key = path.partition(".")
        held = arguments.get(name)
        if isinstance(held, dict):
            arguments.put(name, {own: value for own, value in held.items() if own != key})
    return tuple(arguments.args), arguments.kwargs


class ModelCall:
    """A call read by name. ``chunks``: conditions in it, each ``rows // chunks`` batch rows; ``latents``: one, or several.

    Wrappers of other nodes may leave rows out, or add some: what is no multiple of the conditions is taken for one.
    ``hooked``: strengths that conditioning hooks have for this call.

    The noise level begins to be read when ``level`` is asked for first, which must be before the forward.
    """

    def __init__(self, call: Call, parameters: list[str], hooked: tuple[float, ...] = ()):
        self.call, self.parameters, self.hooked = call, parameters, hooked
        self.arguments = Arguments(parameters, call.args, call.kwargs)
        self.latents = tensors(call.args[0])
        self.rows = self.latents[0].shape[0]
        self.options: dict[str, Any] = self.arguments.get("transformer_options") or {}
        chunks = max(1, len(self.options.get("cond_or_uncond", ())))
        self.chunks = chunks if self.rows % chunks == 0 else 1
        self.before: Mapping[Hashable, int] = {}  # how often earlier calls of the same evaluation had a condition

    @cached_property
    def conditions(self) -> list[Hashable]:
        """Each condition's uuid, or its place where a caller sets none.

        Guidance that runs a condition again with blocks patched (skipped, perturbed) asks for another result, so the patches
        count too, and so do the context window and a LoRA whose strength follows a schedule.
        """
        uuids = self.options.get("uuids")
        found: list[Hashable] = list(uuids) if uuids is not None and len(uuids) == self.chunks else list(range(self.chunks))
        other = (*patches(self.options), *windows.frames(self.options), *self.hooked)
        return [(key, other) for key in found] if other else found

    @cached_property
    def keys(self) -> list[Hashable]:
        """What identifies each condition from step to step, those apart that are asked for more than once in an evaluation."""
        turns = [self.before.get(key, 0) + self.conditions[:index].count(key) for index, key in enumerate(self.conditions)]
        return [(key, "again", turn) if turn else key for key, turn in zip(self.conditions, turns, strict=True)]

    @cached_property
    def level(self) -> Reading:
        sigmas = self.options.get("sigmas")
        return Reading(sigmas.flatten()[:1] if isinstance(sigmas, torch.Tensor) and sigmas.numel() else torch.zeros(1))

    @cached_property
    def sigma(self) -> float:
        """The same, waited for."""
        return float(self.level)

    @property
    def schedule(self) -> list[float]:
        """All noise levels of the sampling run, as far as the sampler says them."""
        levels = self.options.get("sample_sigmas")
        return levels.flatten().tolist() if isinstance(levels, torch.Tensor) else []

    @cached_property
    def shape(self) -> Hashable:
        """What must not change between two forwards for one to be reused in the other: all tensors' shapes, batch rows apart.

        References make the sequence longer, and ControlNet residuals that begin or end are nothing the first block shows.
        """
        given = dict(zip(self.parameters, self.call.args, strict=False)) | self.call.kwargs
        given.pop("transformer_options", None)
        return (form(given, self.rows), self.rows // self.chunks)

    def with_options(self, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The call's arguments with other transformer options."""
        arguments = Arguments(self.parameters, self.call.args, dict(self.call.kwargs))
        arguments.put("transformer_options", options)
        return tuple(arguments.args), arguments.kwargs

    def part(self, start: int, stop: int, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Arguments for batch rows ``start:stop``, with ``options`` for the transformer options."""
        if (start, stop) == (0, self.rows):
            return self.with_options(options)
        per_chunk = self.rows // self.chunks
        inside = [chunk for chunk in range(self.chunks) if chunk * per_chunk < stop and (chunk + 1) * per_chunk > start]
        options = dict(options)
        for name in ("cond_or_uncond", "uuids"):
            if len(options.get(name, ())) == self.chunks:
                options[name] = [options[name][chunk] for chunk in inside]
        if "sigmas" in options:
            options["sigmas"] = take(options["sigmas"], self.rows, start, stop)
        args, kwargs = self.with_options({})
        args, kwargs = take(args, self.rows, start, stop), take(kwargs, self.rows, start, stop)
        arguments = Arguments(self.parameters, args, kwargs)
        arguments.put("transformer_options", options)
        return tuple(arguments.args), arguments.kwargs


class Evaluation:
    """One evaluation of the model by the sampler, which may ask for one condition several times.

    ComfyUI gives the negative prompt a copy of every area of the positive one, uuid included. Other code looks at a condition
    again with a changed latent, or goes over the picture in tiles.
    """

    def __init__(self) -> None:
        self._sigmas: Any = None  # samplers make a tensor for every evaluation; kept, so that no other has its id
        self._level = Reading(torch.zeros(1))
        self._asked: Counter[Hashable] = Counter()

    def count(self, model_calls: Sequence[ModelCall]) -> None:
        """Tell ``model_calls`` what was asked for before them."""
        sigmas, level = model_calls[0].options.get("sigmas"), [call.level for call in model_calls][0]
        # a sampler may write its levels into one tensor; where it does not, nobody has to wait
        if sigmas is None or sigmas is not self._sigmas or float(level) != float(self._level):
            self._sigmas, self._level, self._asked = sigmas, level, Counter()
        for call in model_calls:
            call.before = Counter(self._asked)
            self._asked.update(call.conditions)


def form(value: Any, rows: int) -> Hashable:
    """Shapes and dtypes of all tensors in nested data, without a first dim of ``rows``."""
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape[1:]) if value.ndim and value.shape[0] == rows else tuple(value.shape), value.dtype)
    if isinstance(value, dict):
        return tuple((name, form(item, rows)) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(form(item, rows) for item in value)
    return None


def travelling(options: dict[str, Any]) -> dict[str, Any]:
    """The transformer options that other ranks need: everything but code, and our own override."""
    return {name: value for name, value in options.items() if name not in (*OUTSIDE, *HOLDERS, OVERRIDE, "patches", "patches_replace")}


def functions(options: dict[str, Any]) -> Iterator[tuple[str, str, Hashable, Any]]:
    """The functions that patch blocks, each as (kind, name, place among those of the name, function)."""
    for kind in ("patches", "patches_replace"):
        for name, held in (options.get(kind) or {}).items():
            for place, function in held.items() if isinstance(held, dict) else enumerate(held):
                yield kind, name, place, function


def patches(options: dict[str, Any]) -> tuple[tuple[str, str, Hashable, str], ...]:
    """The patches, with their titles for functions."""
    return tuple((kind, name, place, title(function)) for kind, name, place, function in functions(options))


def first_patch(options: dict[str, Any]) -> str:
    """The first of them in words; "" if there is none."""
    for kind, name, _, function in functions(options):
        return f"the {name} {kind.removesuffix('es').replace('_', ' ')} {title(function)}"
    return ""


def refusal(options: dict[str, Any]) -> str:
    """Why calls with these patches cannot be shared; "" if they can."""
    return next((REFUSED[name] for *_, function in functions(options) if (name := module(function)) in REFUSED), "")


def unsplittable(patcher: ModelPatcher, options: dict[str, Any], previous: Any) -> str:
    """Why a run with these transformer options, ``previous`` the attention override among them, cannot be split; "" if it can."""
    if patcher.get_additional_models_with_key("multigpu"):
        return "ComfyUI's MultiGPU CFG Split already spreads this model: use one or the other"
    if patcher.hook_patches:
        return "conditioning hooks (a LoRA as a hook) change the model's weights while it samples"
    model = patcher.model.diffusion_model
    plan = plan_for(model)
    if previous is not None and plan is not None and not plan.gatherable:
        return f"attention of {plan.family} cannot be gathered for the override {title(previous)} of another node"
    code = first_patch(options) or (f"the attention override {title(previous)}" if previous is not None else "")
    if code and plan is not None and not plan.stacks:
        return f"{code} runs in ComfyUI's own process, and the blocks of {type(model).__name__} are not cut"
    return refusal(options)


def uncached(options: dict[str, Any]) -> str:
    """The first patch that the step cache cannot follow: it may change what blocks after the first do from step to step."""
    for _, name, _, function in functions(options):
        if module(function) in REFUSED or name not in BEFORE and module(function) not in CACHED:
            return title(function)
    return ""


def hooked(patcher: ModelPatcher) -> tuple[float, ...]:
    """The strengths at this step of what conditioning hooks have done to the model for the condition that runs."""
    hooks = patcher.model.current_patcher.current_hooks
    return tuple(hook.strength for hook in hooks.hooks) if hooks is not None else ()


def wrapped(model_options: dict[str, Any]) -> bool:
    """Whether code of other nodes stands around each model call; EasyCache's puts nothing into the model."""
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    held = [wrappers.get(place, {}).values() for place in (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)]
    around = (function for own in held for functions in own for function in functions)
    return "model_function_wrapper" in model_options or any(module(function) != "nodes_easycache" for function in around)


def compiled_elsewhere(options: dict[str, Any]) -> bool:
    """Whether ComfyUI's own torch.compile wrapper (Torch Compile Model and its like) is on the model."""
    return COMPILE_KEY in options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})


def compiled(module: torch.nn.Module) -> bool:
    """Whether ``module`` is what torch.compile made of another, which it holds."""
    return isinstance(getattr(module, "_orig_mod", None), torch.nn.Module)


@contextmanager
def uncompiled(model: torch.nn.Module) -> Iterator[None]:
    """While this pack's hooks are at work: blocks that torch.compile wraps are the blocks themselves."""
    wrapped = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent.named_children()
        if compiled(child)
    ]
    for parent, name, child in wrapped:
        setattr(parent, name, child._orig_mod)
    try:
        yield
    finally:
        for parent, name, child in wrapped:
            setattr(parent, name, child)


def module(function: Any) -> str:
    """The last part of the name of the module that a function, or its class, comes from."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return named.__module__.rpartition("/")[2].rpartition(".")[2]


def title(function: Any) -> str:
    """A name users may recognise: the function's, or its class's, with its module."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__.rpartition('/')[2]}.{named.__qualname__}".replace(".<locals>", "")
