"""What nodes put in place of a model's own: objects such as compiled blocks, and methods.

ComfyUI leaves objects there when a run has ended, and exchanges them for those of the next run when it loads the model. That is
after our run has begun, whose hooks would be on modules that are gone by then.

Other packs write into the model itself, too: a method for good, or a method or a list of blocks for the time of each call.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ..plans.plan import Blocks, Plan, attribute, check
from .calls import title

MODEL = "diffusion_model"
KNOWN = ("comfy", "comfy_aimdo", "comfy_kitchen", "torch", "contextlib", "functools")  # packages that methods of a model come from
ELSEWHERE = "is another node's code, which the other GPUs' processes do not have"
ASIDE = ("__init__", "__repr__", "reset_parameters", "to", "state_dict", "load_state_dict", "_load_from_state_dict", "_save_to_state_dict")
"""Methods that no forward calls: packs that load models in their own way replace them in classes."""
USUAL, HOOKS = frozenset(vars(torch.nn.Module())), ("_forward_hooks", "_forward_pre_hooks")
"""What every module holds in itself."""
OWN = __name__.rpartition(".comfy.")[0]


def settle(patcher: ModelPatcher) -> None:
    """Have the diffusion model hold what ``patcher`` is sampled with, now, as ComfyUI does when it loads it."""
    own = {name: held for name, held in patcher.object_patches.items() if name.partition(".")[0] == MODEL}
    originals = patcher.object_patches_backup  # of all patchers of this model
    for name in [name for name in originals if name.partition(".")[0] == MODEL and name not in own]:
        comfy.utils.set_attr(patcher.model, name, originals.pop(name))
    for name, held in own.items():
        originals.setdefault(name, comfy.utils.set_attr(patcher.model, name, held))


def code(patcher: ModelPatcher) -> str:
    """The first code or module that a node has put into the diffusion model, by name: it may be bound to layers of this very model."""
    found = (name for name, held in patcher.object_patches.items() if name.partition(".")[0] == MODEL and callable(held))
    return next(found, "")


def block_method(patcher: ModelPatcher, plan: Plan) -> str:
    """What a node has put in place of a method or a part of a block, in words; "" if nothing. Raises PlanError as ``check`` does.

    An object patch takes ours away when the model is loaded, and compiled blocks are what their class says, with parts that get no
    options but ours. A whole block in place of another is no such thing.
    """
    lists = [f"{MODEL}.{spec.path}." for spec in plan.stacks]
    for name, held in patcher.object_patches.items():
        if callable(held) and any(name.startswith(start) and "." in name.removeprefix(start) for start in lists):
            return f"code in place of {name}"
    parts = (part for _, blocks in check(plan, patcher.model.diffusion_model) for block in blocks for part in block.modules())
    return next(filter(None, map(replaced, parts)), "")


def foreign(model: torch.nn.Module) -> str:
    """The first method of ``model``, of a part of it or of one's class that is another pack's code, in words; "" if none is."""
    classes: set[type] = set()
    for path, part in model.named_modules():
        if found := replaced(part):
            return f"{found}{path and ' in '}{path}"
        for kind in type(part).__mro__:
            if kind not in classes and kind.__module__.partition(".")[0] in KNOWN:
                classes.add(kind)
                for name, held in vars(kind).items():
                    if name not in ASIDE and hasattr(held, "__globals__") and others(held):
                        return f"{title(held)} in place of {kind.__qualname__}.{name}"
    return ""


def swapped(model: torch.nn.Module, stacks: Iterable[tuple[Blocks, list]]) -> str:
    """The same for what is put there for the time of a call: methods of ``model`` and of its blocks, and lists of blocks."""
    if found := replaced(model):
        return found
    for spec, blocks in stacks:
        held = attribute(model, spec.path)
        if any(one is not other for one, other in zip_longest(held.values() if hasattr(held, "values") else held, blocks)):
            return f"another list in place of {type(model).__name__}.{spec.path}"
        if found := next(filter(None, map(replaced, blocks)), ""):
            return f"{found} in {spec.path}"
    return ""


def replaced(part: torch.nn.Module) -> str:
    """The first method or hook on this very object that is another pack's code, in words; "" if none is."""
    for name, held in vars(part).items():
        if name in USUAL:  # first: every block is looked at in every step
            if name in HOOKS and held and (hook := next(filter(others, held.values()), None)):
                return f"the hook {title(hook)} on {type(part).__qualname__}"
        elif callable(held) and callable(getattr(type(part), name, None)) and others(held):
            return f"{title(held)} in place of {type(part).__qualname__}.{name}"
    return ""


def others(function: Any) -> bool:
    """Whether neither ComfyUI, torch nor this pack has defined ``function``; wrappers of a function count themselves."""
    function = getattr(function, "__func__", function)
    home = getattr(function, "__globals__", {}).get("__name__") or type(function).__module__
    return home.partition(".")[0] not in KNOWN and not home.startswith(OWN)
