"""The First Block Cache written down plainly, around a stock model: what the pack's decisions and latents must equal.

Nothing of the pack is used. Public wrappers and plain forward hooks on the first and the last block watch whole stock
forwards; a forward that counts as a hit is made a second time, with the last block's image tokens replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

KEY = "cache_reference"


@dataclass
class Seen:
    """One whole stock forward. Tensors [rows, image tokens, channels]; `shape`: of one condition's input."""

    keys: list[Hashable]
    sigma: float
    shape: tuple[int, ...]
    first: torch.Tensor | None = None  # what the first block added
    middle: torch.Tensor | None = None  # image tokens after the first block
    rest: torch.Tensor | None = None  # what all later blocks added, and whatever came between them

    def rows(self, index: int) -> slice:
        return slice(index * self.shape[0], (index + 1) * self.shape[0])


@dataclass
class Memory:
    """What is known of one condition."""

    shape: tuple[int, ...]
    first: torch.Tensor
    points: list[tuple[float, torch.Tensor]]
    hits: int = 0


@dataclass
class Reference:
    """`joint`: conditions that run one after the other still count as one forward, as they do when ranks share them."""

    threshold: float
    start: float = float("inf")  # noise levels between which a hit may be
    end: float = 0.0
    limit: int = -1
    taylor: bool = False
    joint: bool = False
    records: list[list[Any]] = field(default_factory=list)  # [noise level, change per condition, hit], as in the run line
    memory: dict[Hashable, Memory] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    replacements: list[torch.Tensor | None] | None = None

    # -- watching a stock model ---------------------------------------------------------------------------------------

    def attach(self, patcher: Any) -> Any:
        """A clone of the ModelPatcher that samples by the rule."""
        from comfy.patcher_extension import WrappersMP

        patcher = patcher.clone()
        model = patcher.model.diffusion_model
        self.blocks = [*model.double_blocks, *model.single_blocks] if hasattr(model, "single_blocks") else list(model.blocks)
        self.text_first = hasattr(model, "single_blocks")
        patcher.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, self.conditions)
        patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, self.forward)
        return patcher

    def conditions(self, executor: Callable, *args: Any) -> Any:
        """Once to see what a stock step does, then as decided."""
        self.seen, self.replacements = [], None
        executor(*args)
        groups = [self.seen] if self.joint else [[one] for one in self.seen]
        self.replacements = [replacement for group in groups for replacement in self.decide(group)]
        return executor(*args)

    def forward(self, executor: Callable, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        options, text = args[-1], args[1].shape[1] if self.text_first else 0
        if self.replacements is not None:
            replacement = self.replacements.pop(0)
            if replacement is None:
                return executor(x, *args, **kwargs)
            return self.hooked(executor, (x, *args), kwargs, text, replacement)
        window = options.get("context_window")  # a long video in parts: each part of a condition has a memory of its own
        keys = list(options["uuids"]) if window is None else [(uuid, tuple(window.index_list)) for uuid in options["uuids"]]
        seen = Seen(keys, float(options["sigmas"].flatten()[0]), (x.shape[0] // len(keys), *x.shape[1:]))
        self.seen.append(seen)
        return self.hooked(executor, (x, *args), kwargs, text, seen)

    def hooked(self, executor: Callable, args: tuple, kwargs: dict, text: int, work: Seen | torch.Tensor) -> torch.Tensor:
        def image(output: Any) -> torch.Tensor:
            return output[0] if isinstance(output, tuple) else output[:, text:]

        before: list[torch.Tensor] = []

        def enter(_block: Any, args: tuple, kwargs: dict) -> None:
            before.append((kwargs["img"] if "img" in kwargs else args[0]).clone())

        def leave_first(_block: Any, _args: tuple, output: Any) -> None:
            if isinstance(work, Seen):
                work.middle = image(output).clone()
                work.first = work.middle - before[0]

        def leave_last(_block: Any, _args: tuple, output: torch.Tensor) -> torch.Tensor | None:
            if isinstance(work, Seen):
                work.rest = None if work.middle is None else output[:, text:] - work.middle
                return None
            return torch.cat((output[:, :text], work), dim=1)

        handles = [
            self.blocks[0].register_forward_pre_hook(enter, with_kwargs=True),
            self.blocks[0].register_forward_hook(leave_first),
            self.blocks[-1].register_forward_hook(leave_last),
        ]
        try:
            return executor(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    # -- the rule -----------------------------------------------------------------------------------------------------

    def decide(self, together: list[Seen]) -> list[torch.Tensor | None]:
        """For each forward: None to compute it, or the image tokens after the last block."""
        sigma = together[0].sigma
        places = [(seen, index, key) for seen in together for index, key in enumerate(seen.keys)]
        changes: list[float | None] = []
        for seen, index, key in places:
            known = self.memory.get(key)
            if known is None or known.shape != seen.shape:
                changes.append(None)
            else:
                change = (known.first - seen.first[seen.rows(index)]).double().abs().mean() / known.first.double().abs().mean()
                changes.append(float(change))
        if None in changes:  # something has nothing to be compared with: everything here starts cold
            changes = [None] * len(changes)
            for _, _, key in places:
                self.memory.pop(key, None)
        allowed = self.end <= sigma <= self.start and all(
            self.limit < 0 or self.memory[key].hits < self.limit for _, _, key in places if key in self.memory
        )
        hit = allowed and all(change is not None and change < self.threshold for change in changes)
        self.records.append([sigma, changes, hit])
        if hit:
            return [self.predicted(seen) for seen in together]
        for seen, index, key in places:
            known = self.memory.setdefault(key, Memory(seen.shape, torch.empty(0), []))
            known.first = seen.first[seen.rows(index)]
            known.points = [point for point in known.points if point[0] != sigma] + [(sigma, seen.rest[seen.rows(index)])]
            known.hits = 0
        return [None] * len(together)

    def predicted(self, seen: Seen) -> torch.Tensor:
        tokens = []
        for index, key in enumerate(seen.keys):
            known = self.memory[key]
            known.hits += 1
            sigma1, rest = known.points[-1]
            if self.taylor and len(known.points) > 1:
                sigma0, rest0 = known.points[-2]
                rest = rest + (seen.sigma - sigma1) * (rest - rest0) / (sigma1 - sigma0)
            tokens.append(seen.middle[seen.rows(index)] + rest)
        return torch.cat(tokens)
