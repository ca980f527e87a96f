"""Running ahead of the device in a run of several ranks.

One rank launches its work long before the device comes to it. Of a forward that ranks share the end would have to be waited for,
because one of them may be lost in it; then every device stands still until ComfyUI, the sampler and this pack have made the next
forward of the result.

Here the sampler is given a result that is still being computed, and goes on. Should the forward turn out to be lost, the sampler
is run again from its start: what it asks again is answered from memory, up to the lost forward, from where on one rank computes.
That takes a sampler that does the same when it is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from torch.utils._pytree import tree_leaves

from . import calls

DEVICES = ("cuda",)  # where launching does not wait
HOLDERS = ("transformer_options", "to_load_options")  # model options that hold functions by name
ROOM = 2**27  # bytes of latents and results that are remembered, at most: all steps of a picture


class Overtaken(RuntimeError):
    """The sampler has used results that will never be there."""


@dataclass(frozen=True)
class Answer:
    latents: list[torch.Tensor]
    conditions: list[Hashable]
    result: Any

    @property
    def size(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.latents, *calls.tensors(self.result)))

    def fits(self, call: calls.ModelCall) -> bool:
        """Whether ``call`` is the same."""
        pairs = list(zip(self.latents, call.latents, strict=False))
        same = len(self.latents) == len(call.latents) and self.conditions == call.conditions
        return same and all(one.shape == other.shape and torch.equal(one, other) for one, other in pairs)


class Ahead:
    """The model calls of a run from its first one on, for as long as all of them are remembered."""

    def __init__(self, device: torch.device):
        self._device = device
        self._answers: list[Answer] = []
        self._next: int | None = None  # of the answers, for a sampler that runs again
        self._complete = True

    def ready(self, model_calls: Sequence[calls.ModelCall]) -> bool:
        """Whether the result of these calls may be used before it is there."""
        if len(model_calls) > 1 or sum(answer.size for answer in self._answers) > ROOM:
            self._complete = False
        return self._complete

    def keep(self, model_calls: Sequence[calls.ModelCall], results: Sequence[Any]) -> None:
        """What was answered, in the order of the calls."""
        if self._complete:
            answers = zip(model_calls, results, strict=True)
            self._answers += [Answer(call.latents, call.conditions, result) for call, result in answers]

    def answer(self, model_calls: Sequence[calls.ModelCall]) -> list[Any] | None:
        """For a sampler that runs again: what it was told. None: it has come to what is new."""
        if self._next is None:
            return None
        if self._next < len(self._answers) and len(model_calls) == 1 and self._answers[self._next].fits(model_calls[0]):
            self._next += 1
            return [self._answers[self._next - 1].result]
        self._next = None
        return None

    def forget(self, last: int) -> None:
        """The ``last`` results will never be there."""
        del self._answers[len(self._answers) - last :]

    def sample(self, run: Callable[..., Any], args: Sequence[Any], land: Callable[[], None]) -> Any:
        """``run(*args)``, which samples, until its result rests on nothing that was lost.

        land: waits for what was answered ahead. It raises ``Overtaken`` if that is lost, and so do model calls.
        """
        random = self._random()
        while True:
            error: BaseException | None = None
            try:
                result = run(*(arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args))
            except BaseException as raised:  # noqa: BLE001  what a sampler makes of results that were lost may be anything
                error = raised
            try:
                land()
            except Overtaken as lost:
                error = lost if error is None or again(error) else error
            if error is None:
                return result
            if not isinstance(error, Overtaken):
                raise error
            self._next, self._complete = 0, False
            self._restore(random)

    def _random(self) -> list[torch.Tensor]:
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else states

    def _restore(self, states: Sequence[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.cuda.set_rng_state(state, self._device)


def begin(guider: comfy.samplers.CFGGuider, sampler: Any, own: str) -> Ahead | None:
    """For a run of several ranks; None where the sampler cannot run ahead. ``own``: the key of this pack among model options."""
    device = guider.model_patcher.load_device
    return Ahead(device) if device.type in DEVICES and repeatable(guider, sampler, own) else None


def again(error: BaseException) -> bool:
    """Whether a sampler that was given lost results may have raised ``error`` for that."""
    return isinstance(error, Exception) and not isinstance(error, comfy.model_management.InterruptProcessingException)


def repeatable(guider: comfy.samplers.CFGGuider, sampler: Any, own: str) -> bool:
    """Whether the sampler does the same when it is run again: ComfyUI's own, and no other node's code between it and the model."""
    if not isinstance(sampler, comfy.samplers.KSAMPLER) or calls.module(guider) not in ("samplers", "nodes_custom_sampler"):
        return False
    options: dict[str, Any] = guider.model_options
    inside = [options.get(name, {}) for name in HOLDERS]
    wrappers = [held for each in inside for place in ("wrappers", "callbacks") for held in each.get(place, {}).values()]
    others = {key for held in wrappers for key, functions in held.items() if functions} - {own}
    held = [sampler.extra_options, sampler.inpaint_options, {name: options[name] for name in options if name not in (*HOLDERS, own)}]
    plain = all(leaf is None or isinstance(leaf, (bool, int, float, str, torch.Tensor)) for leaf in tree_leaves(held))
    stock = sampler.sampler_function.__module__.startswith("comfy.")
    return stock and plain and not others and not any(map(calls.first_patch, inside))
