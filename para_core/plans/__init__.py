"""What to cut in each model family: one file a family, found by the class name of the diffusion model."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from .plan import Blocks, Plan, PlanError, check


def _plans() -> tuple[Plan, ...]:
    """Every plan that the files of this folder hold."""
    files = [import_module(f"{__name__}.{file.name}") for file in iter_modules(__path__)]
    return tuple({id(value): value for file in files for value in vars(file).values() if isinstance(value, Plan)}.values())


PLANS = _plans()

__all__ = ["PLANS", "Blocks", "Plan", "PlanError", "check", "plan_for"]


def plan_for(model) -> Plan | None:
    """The plan whose ``models`` name this module's class exactly (a subclass may cut differently), or None."""
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    return next((plan for plan in PLANS if name.endswith(plan.models)), None)
