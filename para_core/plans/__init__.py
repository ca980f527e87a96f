"""What to cut in each model family: one file a family, found by the class name of the diffusion model."""

from __future__ import annotations

from . import chroma, cogvideox, cosmos, flux, hidream, hunyuan_video, ltxav, ltxv, lumina, minimax, mochi, qwen_image, sd3, wan, whole
from .plan import Blocks, Plan, PlanError, check

PLANS: tuple[Plan, ...] = (
    flux.PLAN,
    chroma.PLAN,
    hunyuan_video.PLAN,
    mochi.PLAN,
    cogvideox.PLAN,
    wan.PLAN,
    wan.VACE,
    wan.HUMO,
    wan.WHOLE,
    minimax.PLAN,
    qwen_image.PLAN,
    ltxv.PLAN,
    ltxav.PLAN,
    sd3.PLAN,
    lumina.PLAN,
    hidream.PLAN,
    cosmos.PREDICT2,
    cosmos.PREDICT1,
    whole.PLAN,
)

__all__ = ["PLANS", "Blocks", "Plan", "PlanError", "check", "plan_for"]


def plan_for(model) -> Plan | None:
    """The plan whose ``models`` name this module's class exactly (a subclass may cut differently), or None."""
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    return next((plan for plan in PLANS if name.endswith(plan.models)), None)
