"""Writes stock_nodes.json: what a running ComfyUI says of the stock nodes that the templates use.

    python tests/publishing/stock_nodes.py http://127.0.0.1:8188
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}
FILES = {"unet_name", "clip_name", "clip_name1", "clip_name2", "vae_name"}  # choices are what is in the folders


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
                    "widget": kind in WIDGETS,
                    "optional": section == "optional",
                    "seed": bool(options.get("control_after_generate")),
                    "choices": [] if name in FILES else [choice["key"] if isinstance(choice, dict) else choice for choice in choices],
                }
            )
    return {"inputs": inputs, "outputs": info["output"]}


def main(address: str) -> None:
    types = {node["type"] for path in (ROOT / "workflows").glob("*.json") for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]}
    with urllib.request.urlopen(f"{address}/object_info") as answer:
        info = json.load(answer)
    stock = {type_: definition(info[type_]) for type_ in sorted(types) if type_ in info and not type_.startswith("Para")}
    Path(__file__).with_suffix(".json").write_text(json.dumps(stock, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
