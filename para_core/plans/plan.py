"""The language of plans: data that says how a family's blocks hold their tokens.

A *segment* is a run of tokens of one kind, named by the plan ("txt", "img"). Segments are cut one by one, along dim 1
unless a block list says otherwise, and every rank keeps its rows of each. README.md beside this file is the how-to.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..sequence.cut import Cut

Segments = tuple[str, ...]
Rule = Callable[["Cut", Any], Any]
Unit = Callable[[Callable[[str], Any], int], int]


class PlanError(RuntimeError):
    """A model does not look as its plan expects, or cannot be cut in this form; the message says why."""


@dataclass(frozen=True)
class Blocks:
    """One list of blocks that runs in order.

    path: attribute path of the module list (or dict) on the diffusion model.
    tokens: block argument -> the segments it holds, in order; a tuple of such for an argument that is several tensors.
    returns: per output of a block, the segments it holds; a single tuple means a single tensor.
    joint: order of the segments in q, k and v of the exchanged attention; a tuple of such, one a call, where a block makes
        several calls that see different segments.
    tables: block argument -> (segments, dim) for what stock code passes whole to every block and that has one row a
        token (rotary tables, per-token modulation, masks). A dim of size 1 is left alone, tuples are cut item by item.
    rules: block argument -> rule(cut, value) for what needs more than a row cut.
    exchange: names of the submodules whose attention sees all tokens; None: every attention call of the block. A mapping
        gives each submodule the segments of its queries and of its keys.
    crosses: names of all other submodules that attend, where their queries are the block's tokens and their keys are whole.
    dim: which dim of token tensors counts rows. batch: which one counts images, None without such a dim. All other dims
        but the last are a grid that is attended to as well: of (B, T, H, W, C) with dim=2 each rank keeps rows of H.
    units: segment -> unit(get, length), the number of rows that stay together, from the block's arguments.
    names: names of the positional arguments, for a forward that takes ``*args``.
    side: a list that runs between the blocks of another and feeds it; its tokens come whole or cut.
    """

    path: str
    tokens: Mapping[str, Segments | tuple[Segments, ...]]
    returns: tuple[Segments, ...]
    joint: Segments | tuple[Segments, ...] = ()
    tables: Mapping[str, tuple[Segments, int]] = field(default_factory=dict)
    rules: Mapping[str, Rule] = field(default_factory=dict)
    exchange: tuple[str, ...] | Mapping[str, tuple[Segments, Segments]] | None = None
    crosses: tuple[str, ...] = ()
    dim: int = 1
    batch: int | None = 0
    units: Mapping[str, Unit] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    side: bool = False

    @cached_property
    def held(self) -> tuple[tuple[str, int | None, Segments], ...]:
        """Every token tensor: its argument, its place in an argument of several, its segments."""
        found: list[tuple[str, int | None, Segments]] = []
        for name, value in self.tokens.items():
            if isinstance(value[0], str):
                found.append((name, None, value))
            else:
                found += [(name, index, segments) for index, segments in enumerate(value)]
        return tuple(found)

    @cached_property
    def joints(self) -> tuple[tuple[Segments, Segments], ...]:
        """Segments of the queries and of the keys, for each exchanged attention call of a block in turn."""
        if not self.joint:
            return ()
        calls = (self.joint,) if isinstance(self.joint[0], str) else self.joint
        return tuple((call, call) for call in calls)

    @cached_property
    def calls(self) -> tuple[tuple[Segments, Segments], ...]:
        """The same where each submodule has its own: in the order of ``exchange``."""
        return tuple(self.exchange.values()) if isinstance(self.exchange, Mapping) else self.joints

    @cached_property
    def segments(self) -> Segments:
        return tuple(dict.fromkeys(name for _, _, segments in self.held for name in segments))


@dataclass(frozen=True)
class Plan:
    """How one family is cut.

    models: ends of the full class names it is for. stacks: block lists in the order they run, side lists anywhere; none
        where only batch rows can be told apart.
    streams: the segments that are used after the last block (gathered there, and compared by the step cache); the rows of
        other segments are dropped by the model itself. heads: attribute path of the number of attention heads.
    text: argument of the model's forward with the text tokens (dim 1), where they are cut too. patch: attribute path of the
        patch size, one number (of height and width) or one a side, or a path a side (nothing there: 1): how many tokens an
        image or a video has at least.
    fewest: fewest(model, latents, get), rows of a segment that may be shorter than these (0: there is none), from the
        latents and the forward's arguments. coupled: coupled(get), whether batch rows depend on each other in this call.
    options: transformer options that the family's forward reads besides patches and the attention override: all that
        compiled blocks and captured forwards are given.
    control: True where ControlNet residuals (``control["input" / "output"]`` lists) are added to a stream between blocks.
    regather: segments that stock code works on between blocks: made whole on every rank after each block, cut again
        before the next. borders="whole": all of them, for models that mix tokens between blocks.
    final: the submodule that takes the stream after the last block, where stock code slices it by lengths of the cut
        sequence in between; the stream is gathered there.
    rebuilt: "argument.key" of what is no plain data in a call and is built by the forward where it is missing.
    decline: decline(model), why this very model cannot be cut, or "".
    outside: the largest part of a forward's memory that is needed outside of the cut blocks, by embedders or the tail, over
        its peak on one card; 1: nobody has looked, and ComfyUI is told that splitting a sequence saves nothing.
    special: what is special about the family, for the README's table.
    """

    family: str
    models: tuple[str, ...]
    stacks: tuple[Blocks, ...]
    streams: Segments
    heads: str = ""
    text: str | None = None
    patch: str | tuple[str, ...] = "patch_size"
    fewest: Callable[[Any, list, Callable[[str], Any]], int] | None = None
    coupled: Callable[[Callable[[str], Any]], bool] | None = None
    control: bool = False
    options: tuple[str, ...] = ()
    regather: Segments = ()
    borders: str = "local"
    final: str = ""
    rebuilt: tuple[str, ...] = ()
    decline: Callable[[Any], str] | None = None
    outside: float | Callable[[Any], float] = 1.0
    special: str = ""

    @cached_property
    def segments(self) -> frozenset[str]:
        return frozenset(name for spec in self.stacks for name in spec.segments)

    def held_outside(self, model: Any) -> float:
        """``outside`` of this very model; 1 where tokens are whole between blocks, or shards must end at borders of frames."""
        if self.borders == "whole" or any(spec.units for spec in self.stacks):
            return 1.0
        return self.outside(model) if callable(self.outside) else self.outside

    @cached_property
    def gatherable(self) -> bool:
        """Whether every attention call inside its blocks can be brought together on one rank."""
        return all(spec.exchange is None or spec.crosses for spec in self.stacks)

    @cached_property
    def whole(self) -> frozenset[str]:
        """Segments that are whole between blocks."""
        return self.segments if self.borders == "whole" else frozenset(self.regather)


def attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def patch_sides(plan: Plan, model: Any, sides: int) -> list[int]:
    """Patch size along each of a latent's last ``sides`` sides: frames, height, width."""
    if isinstance(plan.patch, tuple):
        found = [attribute(model, path) or 1 for path in plan.patch]
    else:
        patch = attribute(model, plan.patch)
        found = [1, patch, patch] if isinstance(patch, int) else list(patch)
    return found[-sides:]


def signature(block) -> inspect.Signature:
    return inspect.signature(type(getattr(block, "_orig_mod", block)).forward)


def parameters(spec: Blocks, block) -> list[str]:
    """Names of a block's forward arguments, in order, without self."""
    return list(spec.names) if spec.names else list(signature(block).parameters)[1:]


def changed(plan: Plan, what: str) -> PlanError:
    return PlanError(f"{what}: this version of ComfyUI builds {plan.family} differently")


def check(plan: Plan, model) -> list[tuple[Blocks, list]]:
    """The plan's block lists as they stand on ``model``, empty ones left out.

    Raises PlanError where a list is missing, a block does not take the arguments the plan names or no transformer options,
    by which alone its attention is reached, or where the plan declines.
    """
    found = []
    for spec in plan.stacks:
        try:
            holder = attribute(model, spec.path)
        except AttributeError:
            raise changed(plan, f"{type(model).__name__} has no {spec.path}") from None
        blocks = list(holder.values() if hasattr(holder, "values") else holder)
        for block in blocks:
            kinds = {parameter.kind for parameter in signature(block).parameters.values()}
            missing = {*spec.tokens, *spec.tables, *spec.rules, "transformer_options"} - set(parameters(spec, block))
            if missing and inspect.Parameter.VAR_KEYWORD not in kinds:
                raise changed(plan, f"{type(block).__name__}.forward takes no {', '.join(sorted(missing))}")
            for name in (*(spec.exchange or ()), *spec.crosses):
                try:
                    attribute(block, name)
                except AttributeError:
                    raise changed(plan, f"{type(block).__name__} has no {name}") from None
        if blocks:
            found.append((spec, blocks))
    sides = plan.patch if isinstance(plan.patch, tuple) else (plan.patch,)
    for path in (plan.heads, *sides) if plan.stacks else ():
        try:
            attribute(model, path)
        except AttributeError:
            raise changed(plan, f"{type(model).__name__} has no {path}") from None
    reason = plan.decline(model) if plan.decline is not None else ""
    if reason:
        raise PlanError(reason)
    if plan.stacks and sum(len(blocks) for spec, blocks in found if not spec.side) < 2:
        raise PlanError(f"{type(model).__name__} has fewer than two blocks")
    return found
