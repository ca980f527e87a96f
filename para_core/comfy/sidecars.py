"""The one group of sidecar processes of this ComfyUI: which devices, which models, and when they are freed."""

from __future__ import annotations

import atexit
import itertools
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.cli_args
import comfy.model_management
import comfy.model_patcher
import torch
from comfy.patcher_extension import CallbacksMP

from ..group.group import Group
from ..group.member import Held
from ..settings import Parallel
from . import files, flags
from . import model as models

SCRIPT = Path(__file__).resolve().parents[1] / "sidecar.py"
MOST_CPU_RANKS = 8
WEAKEST = 8  # times as many multiprocessors as a card that is of no use

_group: Group | None = None
_ids: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_next_id = itertools.count(1)
_stand_ins: dict[str, comfy.model_patcher.ModelPatcher] = {}  # by device


def group() -> Group:
    """Made at first use."""
    global _group
    if _group is None:
        _group = Group(SCRIPT, _hello)
        atexit.register(_group.close)  # a communicator that is still open would abort the process
        atexit.register(_stand_ins.clear)  # patchers do not end well once the modules they use have gone
    return _group


def _hello(rank: int, device: str, size: int) -> dict[str, Any]:
    """What a new worker needs to become the same ComfyUI: its folder and its command-line flags."""
    root = str(Path(comfy.model_management.__file__).resolve().parents[1])
    return {"rank": rank, "device": device, "card": _card(device), "size": size, "root": root, "flags": flags.export()}


def _card(device: str) -> str:
    """What every process calls this card, whatever its number there; "" for the CPU, and where this torch does not know."""
    place = torch.device(device)
    return str(getattr(torch.cuda.get_device_properties(place), "uuid", "")) if place.type == "cuda" else ""


def devices(settings: Parallel, own: torch.device, say: Callable[[str], None]) -> list[str]:
    """Devices of ranks 1.., this model being on ``own``; what cannot be had is said and left out."""
    if settings.gpus == 1:
        return []
    found = _devices(settings, own, say)
    if found and sys.platform != "linux":  # workers are reached through Unix sockets and talk through NCCL
        say("Splitting needs Linux: this run stays on one GPU.")
        return []
    if found and not torch.distributed.is_available():
        say("Splitting needs torch.distributed, which this PyTorch was built without: this run stays on one GPU.")
        return []
    return found


def _devices(settings: Parallel, own: torch.device, say: Callable[[str], None]) -> list[str]:
    if own.type == "cpu":
        if settings.devices.strip():
            say("The input devices names CUDA devices and is left out: this model runs on the CPU, where gpus is the number of processes.")
        if settings.gpus > MOST_CPU_RANKS:
            say(f"{settings.gpus} ranks were asked for on the CPU; {MOST_CPU_RANKS} are used.")
        return ["cpu"] * (min(settings.gpus, MOST_CPU_RANKS) - 1)
    if own.type != "cuda" or torch.version.hip:
        where = "an AMD GPU" if own.type == "cuda" else own
        say(f"Splitting needs NVIDIA GPUs, and this model runs on {where}: this run stays on one GPU.")
        return []
    there = torch.cuda.device_count()
    others = [index for index in range(there) if index != (own.index or 0)]
    if settings.devices.strip():
        words = [word.strip() for word in settings.devices.split(",") if word.strip()]
        wrong = [word for word in words if not word.isdecimal() or int(word) >= there]
        if wrong:
            say(f"There is no CUDA device {', '.join(wrong)} here (there are {there}{_hidden()}): left out.")
        named = dict.fromkeys(int(word) for word in words if word not in wrong)
        others = [index for index in named if index != (own.index or 0)]
    else:
        unfit = {index: why for index in others if (why := _unfit(index, own.index or 0))}
        for index, why in unfit.items():
            say(f"cuda:{index} is left out, unless the input devices names it: {why}.")
        others = [index for index in others if index not in unfit]
    wanted = settings.gpus or 1 + len(others)
    if wanted > 1 + len(others):
        say(f"{wanted} GPUs were asked for and {1 + len(others)} can be used{_hidden() if wanted > there else ''}.")
    return [f"cuda:{index}" for index in others[: wanted - 1]]


def _hidden() -> str:
    """What hides GPUs from this ComfyUI, as the end of a clause."""
    shown = comfy.cli_args.args.cuda_device
    return "" if shown is None else f": ComfyUI was started with --cuda-device {shown}, which hides all others"


def _unfit(index: int, own: int) -> str:
    """Why the card ``index`` can be of no use beside ``own``, such as one that is there for a display; "" if it may be."""
    card, first = map(torch.cuda.get_device_properties, (index, own))
    built = [name.rstrip("af").partition("_") for name in torch.cuda.get_arch_list()]  # such as sm_86, sm_90a, compute_120
    if built and not any(_runs(kind, int(digits), card) for kind, _, digits in built):
        return f"this PyTorch has no kernels for its compute capability {card.major}.{card.minor}"
    if card.multi_processor_count * WEAKEST < first.multi_processor_count:
        return f"it has {card.multi_processor_count} multiprocessors, the first GPU {first.multi_processor_count}"
    return ""


def _runs(kind: str, built: int, card: Any) -> bool:
    """Whether ``card`` runs code built for a capability: as it is, or compiled by the driver."""
    return built <= 10 * card.major + card.minor and (kind == "compute" or built // 10 == card.major)


def warm(settings: Parallel, own: torch.device) -> None:
    """Start the workers a node will need, while the graph before the sampler still runs."""
    found = devices(settings, own, lambda _sentence: None)
    if found:
        group().expect(found)


def model_id(patcher: comfy.model_patcher.ModelPatcher) -> int:
    """The number of the model behind ``patcher``: clones share it, and sidecars free it when it is gone."""
    model = patcher.model
    if model not in _ids:
        _ids[model] = next(_next_id)
        weakref.finalize(model, _forget, _ids[model])
    return _ids[model]


def _forget(number: int) -> None:
    if _group is not None:
        _group.drop(number)


def load(patcher: comfy.model_patcher.ModelPatcher, working: float = 0) -> None:
    """Have every rank hold the model of ``patcher``, patched alike, or open its file where a card cannot hold it.

    working: bytes that computing needs beside the weights. Raises Unshareable, Untransportable, RankLost.
    """
    number, recipe, target = model_id(patcher), models.recipe(patcher), models.held(patcher)
    for member in group().members:
        _stand_in(member.device)
    how, origin = models.options(patcher), files.origin(patcher)
    # once opened it stays so: reading the file again whenever sizes change costs more than holding all of it saves
    if origin is not None and (files.offloaded(patcher, working) or not fit(patcher, working) or group().opened(number)):
        state = f"{target.state} {working}"  # with other needs it is loaded anew
        size = int(min(patcher.model_size() + working, sys.maxsize))
        group().open(number, origin, Held(state, target.changed, opened=True), files.patches(patcher), {**how, "working": working}, size)
    else:
        group().load(number, recipe, target, lambda layers: models.units(patcher, layers), how)


def fit(patcher: comfy.model_patcher.ModelPatcher, working: float) -> bool:
    """Whether every other card has room for the model of ``patcher`` and ``working`` bytes to compute in. Raises RankLost."""
    return group().fits(model_id(patcher), patcher.model_size(), int(min(working, sys.maxsize)))  # an estimate may be infinite


class Sidecars(torch.nn.Module):
    """What ComfyUI sees of the weights in sidecars: a model without any."""


def _stand_in(device: str) -> None:
    """Have the weights of sidecars on ``device`` be among the models that ComfyUI has loaded there, so that it can unload them.

    The model that they were sent from does not do for that: ComfyUI may have unloaded it long before, for want of room on its
    own card, which is no reason for the others, and our nodes' clone of it may have gone.
    """
    patcher = _stand_ins.get(device)
    if patcher is None:
        patcher = comfy.model_patcher.ModelPatcher(Sidecars(), load_device=torch.device(device), offload_device=torch.device("cpu"))
        patcher.add_callback(CallbacksMP.ON_DETACH, _unloaded)
        _stand_ins[device] = patcher
    if not any(loaded is patcher for loaded in comfy.model_management.loaded_models()):
        # not by load_models_gpu: asking how much memory is free there costs a CUDA context, some hundred MB of it
        loaded = comfy.model_management.LoadedModel(patcher)
        loaded.model_load()
        comfy.model_management.current_loaded_models.append(loaded)


def _unloaded(_patcher: comfy.model_patcher.ModelPatcher, unpatch_all: bool) -> None:
    """ON_DETACH callback: ComfyUI wants the memory."""
    if unpatch_all:
        for number in list(_ids.values()):
            _forget(number)
