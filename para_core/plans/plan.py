"""The language of plans: data that says how a family's blocks hold their tokens.

A *segment* is a run of tokens of one kind, named by the plan ("txt", "img"). Segments are cut one by one, along dim 1
unless a block list says otherwise, and every rank keeps its rows of each.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..sequence.cut import Cut

Segments = tuple[str, ...]
Rule = Callable[["Cut", Any], Any]


class PlanError(RuntimeError):
    """A model does not look as its plan expects; the message says what differs."""


@dataclass(frozen=True)
class Blocks:
    """One list of blocks that runs in order.

    path: attribute path of the module list on the diffusion model.
    tokens: block argument -> the segments it holds, in order.
    returns: per output of a block, the segments it holds; a single tuple means a single tensor.
    joint: order of the segments in q, k and v of the exchanged attention.
    tables: block argument -> (segments, dim) for what stock code passes whole to every block and that has one row a
        token (rotary tables, per-token modulation, masks). A dim of size 1 is left alone, tuples are cut item by item.
    rules: block argument -> rule(cut, value) for what needs more than a row cut.
    exchange: names of the submodules whose attention sees all tokens; None: every attention call of the block.
    """

    path: str
    tokens: Mapping[str, Segments]
    returns: tuple[Segments, ...]
    joint: Segments
    tables: Mapping[str, tuple[Segments, int]] = field(default_factory=dict)
    rules: Mapping[str, Rule] = field(default_factory=dict)
    exchange: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Plan:
    """How one family is cut.

    models: ends of the full class names it is for. stacks: block lists in the order they run.
    stream: the segment that is used after the last block (gathered there, and compared by the step cache); the rows of
        other segments are dropped by the model itself. heads: attribute path of the number of attention heads.
    text: argument of the model's forward with the text tokens (dim 1), where they are cut too. patch: attribute path of the
        patch size, one number or one a side: how many tokens an image or a video has at least.
    options: transformer options that the family's forward reads besides patches and the attention override; None: not
        known, so its blocks are neither compiled nor captured.
    control: True where ControlNet residuals (``control["input" / "output"]`` lists) are added to ``stream`` between blocks.
    """

    family: str
    models: tuple[str, ...]
    stacks: tuple[Blocks, ...]
    stream: str
    heads: str
    text: str | None = None
    patch: str = "patch_size"
    control: bool = False
    options: tuple[str, ...] | None = None


def attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def parameters(block) -> list[str]:
    """Names of a block's forward arguments, in order, without self."""
    return list(inspect.signature(type(block).forward).parameters)[1:]


def changed(plan: Plan, what: str) -> PlanError:
    return PlanError(f"{what}: this version of ComfyUI builds {plan.family} differently")


def check(plan: Plan, model) -> list[tuple[Blocks, list]]:
    """The plan's block lists as they stand on ``model``, empty ones left out.

    Raises PlanError where a list is missing or a block does not take the arguments the plan names.
    """
    found = []
    for spec in plan.stacks:
        try:
            blocks = list(attribute(model, spec.path))
        except AttributeError:
            raise changed(plan, f"{type(model).__name__} has no {spec.path}") from None
        for block in blocks:
            missing = {*spec.tokens, *spec.tables, *spec.rules} - set(parameters(block))
            if missing:
                raise changed(plan, f"{type(block).__name__}.forward takes no {', '.join(sorted(missing))}")
            for name in spec.exchange or ():
                if not hasattr(block, name):
                    raise changed(plan, f"{type(block).__name__} has no {name}")
        if blocks:
            found.append((spec, blocks))
    if sum(len(blocks) for _, blocks in found) < 2:
        raise PlanError(f"{type(model).__name__} has fewer than two blocks")
    return found
