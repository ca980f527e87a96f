"""What the plans rely on in a ComfyUI tree: classes, entry methods, block lists, signatures of blocks."""

from __future__ import annotations

import importlib
import inspect

import torch
from families.cases import CASES

from para_core.plans import PLANS, Plan, PlanError, check, plan_for
from para_core.plans.plan import Blocks, attribute, signature

Facts = dict[str, dict[str, str]]
"""Class name -> what -> how it looks."""


def listed(parameters: list[inspect.Parameter]) -> str:
    """Parameters without self, defaults and types."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return ", ".join(stars.get(parameter.kind, "") + parameter.name for parameter in parameters if parameter.name != "self")


def of_class(name: str) -> dict[str, str]:
    """A model class as the module has it, without building it."""
    from para_core.comfy import calls

    module, _, title = name.rpartition(".")
    try:
        kind = getattr(importlib.import_module(f"comfy.{module}"), title)
    except (ImportError, AttributeError) as error:
        return {"class": f"missing: {error}"}
    method = calls.entry(kind.__new__(kind))
    return {"class": "there", f"{method}()": listed(list(inspect.signature(getattr(kind, method)).parameters.values()))}


def of_blocks(spec: Blocks, model: torch.nn.Module) -> dict[str, str]:
    try:
        held = attribute(model, spec.path)
    except AttributeError:
        return {spec.path: "missing"}
    found = {}
    for block in held.values() if hasattr(held, "values") else held:
        title = f"{spec.path}: {type(block).__name__}.forward()"
        found[title] = listed(list(signature(block).parameters.values()))
        for name in spec.exchange or ():
            try:
                found[f"{spec.path}: {name}"] = type(attribute(block, name)).__name__
            except AttributeError:
                found[f"{spec.path}: {name}"] = "missing"
    return found


def of_model(plan: Plan, model: torch.nn.Module) -> dict[str, str]:
    """A tiny model: block lists, what the split reads, and whether the plan takes it."""
    found: dict[str, str] = {}
    for spec in plan.stacks:
        found |= of_blocks(spec, model)
    patches = (plan.patch if isinstance(plan.patch, tuple) else (plan.patch,)) if plan.stacks else ()
    for path in filter(None, (plan.heads, *patches, plan.final)):
        try:
            attribute(model, path)
            found[path] = "there"
        except AttributeError:
            found[path] = "missing"
    try:
        check(plan, model)
        found["plan"] = "attaches"
    except PlanError as error:
        found["plan"] = f"declines: {error}"
    return found


def facts() -> Facts:
    """Of every class that a plan with block lists names. Call it where ComfyUI can be imported."""
    found = {name: {"family": plan.family, **of_class(name)} for plan in PLANS if plan.stacks for name in plan.models}
    for case, build in CASES.items():
        try:
            model, _ = build()
        except Exception as error:  # noqa: BLE001  whatever another tree does is what is asked for
            found.setdefault(f"case {case}", {})["tiny model"] = f"cannot be built: {type(error).__name__}: {error}"
            continue
        plan = plan_for(model)
        if plan is None:
            found.setdefault(f"case {case}", {})["plan"] = f"none for {type(model).__module__}.{type(model).__qualname__}"
        elif plan.stacks:
            name = next(name for name in plan.models if f"{type(model).__module__}.{type(model).__qualname__}".endswith(name))
            for what, how in of_model(plan, model).items():
                found[name].setdefault(what, how)
    return found


def differences(before: Facts, now: Facts) -> list[tuple[str, str, str, str]]:
    """(class, what, before, now) for everything that is not the same; what follows from a row is left out."""
    rows, said = [], set()
    for name in sorted({*before, *now}):
        one, other = before.get(name, {}), now.get(name, {})
        changed = [what for what in dict.fromkeys((*one, *other)) if one.get(what) != other.get(what)]
        if "class" in changed:
            changed = ["class"]
        elif "plan" in one and "plan" not in other:
            changed = [what for what in changed if what in other]  # no tiny model of it, which has a row of its own
        for what in changed:
            row = (what, one.get(what, "not there"), other.get(what, "not there"))
            if what != "tiny model" or row not in said:
                rows.append((name, *row))
            said.add(row)
    return rows


def words(before: str, now: str) -> str:
    """A difference in short: for lists of names what came and went."""
    old, new = before.split(", "), now.split(", ")
    if len(old) == 1 and len(new) == 1:
        return f"{before} -> {now}"
    came, went = [name for name in new if name not in old], [name for name in old if name not in new]
    changes = [f"new: {', '.join(came)}"] * bool(came) + [f"gone: {', '.join(went)}"] * bool(went)
    return "; ".join(changes) or "another order"
