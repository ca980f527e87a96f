"""A small picture of a template, drawn from its own nodes and links: what the template browser shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH = 660
LINKS = {"MODEL": "#b39ddb", "CLIP": "#ffd500", "VAE": "#ff6e6e", "CONDITIONING": "#ffa931", "LATENT": "#ff9cf9", "IMAGE": "#64b5f6"}
TITLES = {
    "UNETLoader": "Load Diffusion Model",
    "CheckpointLoaderSimple": "Load Checkpoint",
    "CLIPTextEncode": "CLIP Text Encode",
    "VAELoader": "Load VAE",
    "ParaAccelerate": "Accelerate Sampling",
    "ParaReport": "Sampling Report",
    "ParaParallel": "Split Steps Across GPUs",
    "ParaAttention": "Attention Backend",
    "ParaFirstBlockCache": "First Block Cache",
}


def draw(graph: dict[str, Any], path: Path) -> None:
    nodes = [node for node in graph["nodes"] if node["type"] != "MarkdownNote"]
    right = max(node["pos"][0] + node["size"][0] for node in nodes) + 40
    bottom = max(node["pos"][1] + node["size"][1] for node in nodes) + 40
    scale = WIDTH / (right + 40) * 2  # twice the size, then halved: smooth edges
    image = Image.new("RGB", (WIDTH * 2, round((bottom + 100) * scale)), "#141414")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(round(20 * scale))

    def at(x: float, y: float) -> tuple[float, float]:
        return ((x + 40) * scale, (y + 90) * scale)

    for group in graph["groups"]:
        x, y, width, height = group["bounding"]
        pen.rectangle((*at(x, y), *at(x + width, y + height)), fill="#1b2b36", outline="#3f789e", width=2)
        pen.text(at(x + 8, y + 4), group["title"], font=ImageFont.load_default(round(24 * scale)), fill="#8fb8d6")
    by_id = {node["id"]: node for node in nodes}
    for _, source, slot, target, target_slot, kind in graph["links"]:
        one, other = by_id[source], by_id[target]
        start = at(one["pos"][0] + one["size"][0], one["pos"][1] + 18 + 22 * slot)
        end = at(other["pos"][0], other["pos"][1] + 18 + 22 * target_slot)
        pen.line((*start, *end), fill=LINKS.get(kind, "#9e9e9e"), width=3)
    for node in nodes:
        (x, y), (width, height) = node["pos"], node["size"]
        ours = node["type"].startswith("Para")
        pen.rounded_rectangle((*at(x, y - 28), *at(x + width, y + height - 28)), 8, fill="#335533" if ours else "#353535")
        pen.text(at(x + 10, y - 24), node.get("title") or TITLES.get(node["type"], node["type"]), font=font, fill="#f2f2f2")
        sockets = sum("widget" not in entry for entry in node["inputs"])
        line = y + 8 + 22 * max(sockets, len(node["outputs"]))
        names = [entry["name"] for entry in node["inputs"] if "widget" in entry]
        values = [value for value in node["widgets_values"] if value != "randomize"]
        for name, value in zip(names, values, strict=False):
            if line > y + height - 44:
                break
            pen.text(at(x + 12, line), f"{name}  {value}"[: int(width / 10)], font=font, fill="#bdbdbd")
            line += 26
    image.resize((WIDTH, image.height // 2), Image.Resampling.LANCZOS).save(path, quality=80, optimize=True)
