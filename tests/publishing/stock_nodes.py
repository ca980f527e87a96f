"""What a ComfyUI says of the stock nodes that the templates use: stock_nodes.json, written by make_workflows.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}
FILES = {"unet_name", "clip_name", "clip_name1", "clip_name2", "clip_name3", "clip_name4", "vae_name", "ckpt_name", "text_encoder", "image"}
"""Inputs whose choices are what is in the folders."""


def is_widget(type_: str) -> bool:
    """Whether an input is a widget; some take one of several types."""
    return set(type_.split(",")) <= WIDGETS


def definition(info: dict) -> dict:
    inputs = []
    for section in ("required", "optional"):
        for name in info["input_order"].get(section, []):
            kind, *options = info["input"][section][name]
            options = options[0] if options else {}
            choices = kind if isinstance(kind, list) else options.get("options", [])
            kind = "COMBO" if isinstance(kind, list) else kind
            inputs.append(
                {
                    "name": name,
                    "type": kind,
                    "widget": is_widget(kind),
                    "optional": section == "optional",
                    "seed": bool(options.get("control_after_generate")),
                    "choices": [] if name in FILES else [choice["key"] if isinstance(choice, dict) else choice for choice in choices],
                }
            )
    return {"inputs": inputs, "outputs": info["output"]}


def write(info: dict[str, Any], types: set[str]) -> None:
    """Keep what ``info`` (the server's /object_info) says of the stock nodes among ``types``."""
    stock = {type_: definition(info[type_]) for type_ in sorted(types) if type_ in info and not type_.startswith("Para")}
    Path(__file__).with_suffix(".json").write_text(json.dumps(stock, indent=1) + "\n", encoding="utf-8")
