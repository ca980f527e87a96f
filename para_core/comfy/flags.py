"""ComfyUI's command-line flags as plain data, so that sidecars follow rank 0's without a command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import comfy.cli_args
import comfy_aimdo.control

GIB = 2**30


def export() -> dict[str, Any]:
    """Rank 0's flags."""
    plain = (bool, int, float, str, list, type(None))
    flags = {name: value for name, value in vars(comfy.cli_args.args).items() if isinstance(value, plain)}
    return flags | {"fast": sorted(feature.value for feature in comfy.cli_args.args.fast)}


def adopt(flags: dict[str, Any]) -> None:
    """Take over rank 0's flags; before any other module of ComfyUI reads them."""
    for name, value in flags.items():
        if name == "fast":
            value = {comfy.cli_args.PerformanceFeature(feature) for feature in value}
        if hasattr(comfy.cli_args.args, name):
            setattr(comfy.cli_args.args, name, value)
    if comfy.cli_args.enables_dynamic_vram():
        # What ComfyUI's main program does at this place: its other modules look for the library when they are imported.
        args = comfy.cli_args.args
        headroom = None if args.reserve_vram is None else int(args.reserve_vram * GIB)
        _known(comfy_aimdo.control.init, simple_vram_headroom=headroom, nvml_pressure=not getattr(args, "disable_nvml_pressure", False))


def dynamic_vram(index: int) -> bool:
    """Give CUDA device ``index`` to the library of dynamic VRAM, as ComfyUI's main program does for rank 0. False: there is none."""
    headroom = int(getattr(comfy.cli_args.args, "vram_headroom", 0) * GIB)
    found = comfy_aimdo.control.init_devices([(index, headroom) if headroom else index])
    if found:
        comfy_aimdo.control.set_log_info()  # else it writes a line for every allocation
    return found


def _known(function: Callable[..., Any], **options: Any) -> Any:
    """Call with those options that this version of the library knows."""
    parameters = inspect.signature(function).parameters
    return function(**{name: value for name, value in options.items() if name in parameters})
