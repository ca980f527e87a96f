"""Objects that nodes put in place of a model's own, such as compiled blocks.

ComfyUI leaves them there when a run has ended, and exchanges them for those of the next run when it loads the model. That is
after our run has begun, whose hooks would be on modules that are gone by then.
"""

from __future__ import annotations

import comfy.utils
from comfy.model_patcher import ModelPatcher

from ..plans.plan import Plan

MODEL = "diffusion_model"


def settle(patcher: ModelPatcher) -> None:
    """Have the diffusion model hold what ``patcher`` is sampled with, now, as ComfyUI does when it loads it."""
    own = {name: held for name, held in patcher.object_patches.items() if name.partition(".")[0] == MODEL}
    originals = patcher.object_patches_backup  # of all patchers of this model
    for name in [name for name in originals if name.partition(".")[0] == MODEL and name not in own]:
        comfy.utils.set_attr(patcher.model, name, originals.pop(name))
    for name, held in own.items():
        originals.setdefault(name, comfy.utils.set_attr(patcher.model, name, held))


def block_method(patcher: ModelPatcher, plan: Plan) -> str:
    """The first ``forward`` of a block that a node has replaced; "" if there is none. It takes ours away when the model is loaded."""
    lists = [f"{MODEL}.{spec.path}" for spec in plan.stacks]
    found = (name for name in patcher.object_patches if name.endswith(".forward") and name.rsplit(".", 2)[0] in lists)
    return next(found, "")
