"""What it takes until several ranks can share a step: the group's start, and the model's way to the others."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable

import cases
import comfy.model_management
import torch
import turns
from comfy.model_patcher import ModelPatcher
from record import Record, Row, memory
from rows import attempt
from sizes import CASES
from steps import ranks, sized

from para_core.comfy import files, sidecars
from para_core.comfy import model as models
from para_core.group.member import Held

NAME = "flux-1024"


def measure(record: Record, options: Namespace) -> None:
    """Rows of a group of two ranks, each on a device of its own. The rows build on each other, so all are measured or none."""
    ways: dict[str, Callable[[ModelPatcher], Row]] = {
        "cold start": lambda _model: {"seconds": start()},
        "again, workers there": lambda _model: {"seconds": start()},
        "weights by broadcast": broadcast,
        "weights by file": by_file,
    }
    if all(record.find("group", case=NAME, way=way, memory=memory()) for way in ways):
        return
    if 2 not in ranks():
        record.put("group", {"case": NAME, "way": "all", "memory": memory(), "absent": "one GPU"})
        print("group: needs two GPUs")
        return
    model = cases.from_file(NAME, sized(CASES[NAME], options), options.folder)
    sidecars.group().close()
    with turns.alone(), torch.inference_mode():
        comfy.model_management.load_models_gpu([model])
        for way, function in ways.items():
            with attempt(record, "group", {"case": NAME, "way": way, "memory": memory()}, options) as row:
                row.update(function(model))
    sidecars.group().end()


def start() -> float:
    """Seconds until a group of two is joined; from nothing the first time."""
    device = comfy.model_management.get_torch_device()
    others = [f"cuda:{index}" for index in range(torch.cuda.device_count()) if index != device.index][:1] or ["cpu"]
    began = time.perf_counter()
    sidecars.group().form(device, others)
    return round(time.perf_counter() - began, 2)


def sent(model: ModelPatcher, way: Callable[[], None]) -> Row:
    """The seconds of ``way`` and what that is in bytes."""
    began = time.perf_counter()
    way()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return {
        "seconds": round(seconds, 3),
        "gb": round(model.model_size() / 1e9, 2),
        "gb_a_second": round(model.model_size() / 1e9 / seconds, 2),
    }


def broadcast(model: ModelPatcher) -> Row:
    """From card to card, as the first prompt does it where the cards can hold the model."""
    group, number, recipe, target = sidecars.group(), sidecars.model_id(model), models.recipe(model), models.held(model)
    return sent(model, lambda: group.load(number, recipe, target, lambda layers: models.units(model, layers), models.options(model)))


def by_file(model: ModelPatcher) -> Row:
    """The other rank opens the file itself, which this one has just read: it is in the system's memory."""
    group, number, origin = sidecars.group(), sidecars.model_id(model), files.origin(model)
    if origin is None:
        raise RuntimeError("the model's loader left no record of its file")
    target, how = Held("file", frozenset(), opened=True), {**models.options(model), "working": 0.0}
    return sent(model, lambda: group.open(number, origin, target, files.patches(model), how))
