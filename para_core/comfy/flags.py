"""ComfyUI's command-line flags as plain data, so that sidecars follow rank 0's without a command line."""

from __future__ import annotations

from typing import Any

import comfy.cli_args


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
