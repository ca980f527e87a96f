"""Running ahead of the device in a run of several ranks.

One rank launches its work long before the device comes to it. Of a forward that ranks share the end would have to be waited for,
because one of them may be lost in it; then every device stands still until ComfyUI, the sampler and this pack have made the next
forward of the result.

Here the sampler is given a result that is still being computed, and goes on. Should the forward turn out to be lost, the sampler
is run again from its start: what it asks again is answered from memory, up to the lost forward, from where on one rank computes.
That takes a sampler that does the same when it is run again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from torch.utils._pytree import tree_leaves

from . import calls

DEVICES = ("cuda",)  # where launching does not wait
HOLDERS = ("transformer_options", "to_load_options")  # model options that hold functions by name
ROOM = 2**27  # bytes of latents and results to remember, about: all steps of a picture, or of a short clip


class Overtaken(RuntimeError):
    """The sampler has used results that will never be there."""


@dataclass(frozen=True)
class Answer:
    latents: list[torch.Tensor]
    conditions: list[Hashable]
    result: Any

    def fits(self, call: calls.ModelCall) -> bool:
        """Whether ``call`` is the same."""
        pairs = list(zip(self.latents, call.latents, strict=False))
        same = len(self.latents) == len(call.latents) and self.conditions == call.conditions
        return same and all(one.shape == other.shape and torch.equal(one, other) for one, other in pairs)


class Ahead:
    """The model calls of a run from its first one on, for as long as all of them are remembered. ``steps``: of the sampler."""

    def __init__(self, device: torch.device, steps: int):
        self._device, self._steps = device, steps
        self._answers: list[Answer] = []
        self._size = 0
        self._next: int | None = None  # of the answers, for a sampler that runs again
        self._complete = True

    def ready(self, model_calls: Sequence[calls.ModelCall]) -> bool:
        """Whether the result of these calls may be used before it is there."""
        size = max(self._size, 2 * self._steps * sum(latent.nbytes for latent in model_calls[0].latents))
        self._complete = self._complete and len(model_calls) == 1 and size <= ROOM
        return self._complete

    def keep(self, model_calls: Sequence[calls.ModelCall], results: Sequence[Any]) -> None:
        """What was answered, in the order of the calls."""
        if self._complete:
            for call, result in zip(model_calls, results, strict=True):
                self._answers.append(Answer(call.latents, call.conditions, result))
                self._size += sum(tensor.nbytes for tensor in (*call.latents, *calls.tensors(result)))

    def answer(self, model_calls: Sequence[calls.ModelCall]) -> list[Any] | None:
        """For a sampler that runs again: what it was told. None: it has come to what is new."""
        if self._next is None:
            return None
        if self._next < len(self._answers) and len(model_calls) == 1 and self._answers[self._next].fits(model_calls[0]):
            self._next += 1
            return [self._answers[self._next - 1].result]
        self._next = None
        self._answers.clear()
        return None

    def forget(self, last: int) -> None:
        """The ``last`` results may never be there."""
        del self._answers[max(0, len(self._answers) - last) :]

    def sample(self, run: Callable[..., Any], args: Sequence[Any], land: Callable[[], None]) -> Any:
        """``run(*args)``, which samples, until its result rests on nothing that was lost.

        land: waits for what was answered ahead. It raises ``Overtaken`` if that is lost, and so do model calls.
        """
        random = self._random()
        while True:
            try:
                result = run(*(arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args))
            except Overtaken:
                pass
            except BaseException as error:  # of results that were lost a sampler may make anything
                if arrived(land) or not explained(error):
                    raise
            else:
                if arrived(land):
                    return result
            self._next, self._complete = 0, False
            self._restore(random)

    def _random(self) -> list[torch.Tensor]:
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else states

    def _restore(self, states: Sequence[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.cuda.set_rng_state(state, self._device)


def arrived(land: Callable[[], None]) -> bool:
    """Whether all that was answered ahead is there."""
    try:
        land()
    except Overtaken:
        return False
    return True


def explained(error: BaseException) -> bool:
    """Whether a sampler that was given lost results may have raised ``error`` for that."""
    return isinstance(error, Exception) and not isinstance(error, comfy.model_management.InterruptProcessingException)


def begin(guider: comfy.samplers.CFGGuider, sampler: Any, steps: int, own: str) -> Ahead | None:
    """For a run of several ranks; None where the sampler cannot run ahead. ``own``: the key of this pack among model options."""
    device = guider.model_patcher.load_device
    return Ahead(device, steps) if device.type in DEVICES and repeatable(guider, sampler, own) else None


def repeatable(guider: comfy.samplers.CFGGuider, sampler: Any, own: str) -> bool:
    """Whether the sampler does the same when it is run again: ComfyUI's own, and no other node's code between it and the model."""
    if type(sampler) is not comfy.samplers.KSAMPLER or not stock(sampler.sampler_function) or not stock(type(guider)):
        return False
    options: dict[str, Any] = guider.model_options
    inside = [options.get(name, {}) for name in HOLDERS]
    wrappers = [held for each in inside for place in ("wrappers", "callbacks") for held in each.get(place, {}).values()]
    others = {key for held in wrappers for key, functions in held.items() if functions} - {own}
    held = [sampler.extra_options, sampler.inpaint_options, {name: options[name] for name in options if name not in (*HOLDERS, own)}]
    plain = all(leaf is None or isinstance(leaf, (bool, int, float, str, torch.Tensor)) for leaf in tree_leaves(held))
    steered = any("control" in condition for each in guider.original_conds.values() for condition in each)
    return plain and not others and not steered and not any(map(calls.first_patch, inside))


def stock(code: Any) -> bool:
    """Whether a function or a class is ComfyUI's own."""
    path = Path(getattr(sys.modules.get(code.__module__), "__file__", None) or "/").resolve()
    root = Path(comfy.samplers.__file__).resolve().parents[1]
    return any(path.is_relative_to(root / name) for name in ("comfy", "comfy_extras"))
