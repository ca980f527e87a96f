"""The shipped templates as the server runs them: their API form, and the same on tiny models.

The API form is made from the template's own nodes, links and values, by the schemas of the server that runs it. For the
tiny form, loaders, text encoders and what needs a VAE are replaced by test nodes, sizes and steps are made small, and
what follows the sampler gives way to SaveLatent; everything else is the shipped graph.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}
SMALL = {"width": 128, "height": 96, "length": 9, "steps": 2, "frames_number": 9}
LOADERS = ("UNETLoader", "CheckpointLoaderSimple")
SAMPLERS = ("KSampler", "SamplerCustomAdvanced")
Graph = dict[str, dict[str, Any]]
Schema = Callable[[str], dict[str, Any]]  # node class -> its entry of /object_info

# template: the case of tests/families/stock.py that stands for its model
CASES = {
    "flux": "flux",
    "accelerate_flux": "flux",
    "hunyuan_video": "hunyuan video",
    "mochi": "mochi",
    "cogvideox": "cogvideox",
    "wan_t2v": "wan",
    "minimax_h3": "minimax",
    "qwen_image": "qwen image",
    "qwen_image_edit": "qwen image edit",
    "ltx_video": "ltx video",
    "ltx_2": "ltx 2",
    "sd3_5": "sd3.5 medium",
    "lumina_2": "lumina 2",
    "z_image": "z-image",
    "hidream": "hidream",
    "cosmos_predict2": "cosmos predict2",
    "chroma": "chroma",
    "kandinsky_5": "kandinsky 5",
    "omnigen2": "omnigen2",
    "krea_2": "krea 2",
}


def load(name: str) -> dict[str, Any]:
    return json.loads((ROOT / f"workflows/{name}.json").read_text(encoding="utf-8"))


def widgets(schema: dict[str, Any]) -> list[str]:
    """Names that the values of a template's node belong to, in order; "" for what a seed does after a run."""
    found = []
    for section in ("required", "optional"):
        for name in schema["input_order"].get(section, []):
            kind, *options = schema["input"][section][name]
            if isinstance(kind, list) or set(kind.split(",")) <= WIDGETS:
                found += [name, ""] if options and options[0].get("control_after_generate") else [name]
    return found


def api(template: dict[str, Any], schema: Schema) -> Graph:
    """What the frontend would send for this template."""
    sources = {link: [str(source), slot] for link, source, slot, *_ in template["links"]}
    graph = {}
    for node in template["nodes"]:
        if node["type"] in ("MarkdownNote", "Note"):
            continue
        inputs = dict(zip(widgets(schema(node["type"])), node["widgets_values"], strict=True))
        inputs.pop("", None)
        inputs |= {entry["name"]: sources[entry["link"]] for entry in node["inputs"] if entry["link"] is not None}
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph


def tiny(name: str, schema: Schema, *, gpus: int) -> Graph:
    """The API form of a template on its tiny model; ``gpus`` 0: without our nodes."""
    graph = api(load(name), schema)
    case = CASES[name]
    for number, node in graph.items():
        kind, inputs = node["class_type"], node["inputs"]
        found = schema(kind)
        types = {entry: found["input"][section][entry][0] for section in found["input"] for entry in found["input"][section]}
        if kind in LOADERS:
            graph[number] = {"class_type": "TestModel", "inputs": {"case": case}}
        elif found["output"][:1] == ["CONDITIONING"] and "CLIP" in [str(types[entry]) for entry in inputs]:
            negative = number in negatives(graph)
            graph[number] = {"class_type": "TestPrompt", "inputs": {"case": case, "scale": 0.7 if negative else 1.0}}
        elif found["output"][:1] == ["LATENT"] and "VAE" in [str(types[entry]) for entry in inputs]:
            audio = {"width": 16, "height": 13, "frames": 0, "channels": 8} if "AudioLatent" in kind or "LatentAudio" in kind else None
            picture = {"width": 16, "height": 12, "frames": 0, "channels": 16}
            graph[number] = {"class_type": "TestLatent", "inputs": {"batch_size": 1, **(audio or picture)}}
        elif kind == "ParaParallel":
            inputs["gpus"] = gpus
        elif kind == "ParaAccelerate":
            inputs |= {"gpus": gpus, "cache": "off"}
        elif kind == "ParaFirstBlockCache":
            inputs["threshold"] = 1e-9  # enabled, and never hitting
        inputs |= {entry: SMALL[entry] for entry in SMALL.keys() & inputs.keys() if not isinstance(inputs[entry], list)}
    (sampler,) = [number for number, node in graph.items() if node["class_type"] in SAMPLERS]
    result = [sampler, 0]
    if case in ("minimax", "ltx 2"):
        graph["parts"] = {"class_type": "LTXVSeparateAVLatent", "inputs": {"av_latent": result}}
        result = ["parts", 0]
        graph["sound"] = {"class_type": "SaveLatent", "inputs": {"samples": ["parts", 1], "filename_prefix": "sound"}}
    graph["latent"] = {"class_type": "SaveLatent", "inputs": {"samples": result, "filename_prefix": "latent"}}
    if not gpus:
        without_ours(graph)
    return needed(graph, [number for number in ("latent", "sound") if number in graph])


def negatives(graph: Graph) -> set[str]:
    """Nodes that end in a ``negative`` input without passing through a ``positive`` one."""
    found = {node["inputs"]["negative"][0] for node in graph.values() if "negative" in node["inputs"]}
    return found - {node["inputs"]["positive"][0] for node in graph.values() if "positive" in node["inputs"]}


def without_ours(graph: Graph) -> None:
    """Bypass our nodes, as Ctrl+B does."""
    for number in [number for number, node in graph.items() if node["class_type"].startswith("Para")]:
        inputs = graph.pop(number)["inputs"]
        source = inputs["samples" if "samples" in inputs else "model"]
        for node in graph.values():
            node["inputs"] = {name: source if value == [number, 0] else value for name, value in node["inputs"].items()}


def needed(graph: Graph, ends: list[str]) -> Graph:
    """The part of a graph that ``ends`` depend on."""
    kept: Graph = {}
    waiting = list(ends)
    while waiting:
        number = waiting.pop()
        if number not in kept:
            kept[number] = graph[number]
            waiting += [value[0] for value in graph[number]["inputs"].values() if isinstance(value, list)]
    return kept
