"""A template under construction: nodes, links and places, in the form the frontend saves."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

from publishing.stock_nodes import is_widget

OURS = {"color": "#232", "bgcolor": "#353"}
NOTE = {"color": "#432", "bgcolor": "#653"}
COLUMN, GAP, BELOW = 350, 50, 420  # from column to column; between nodes; where the lower row begins
VERSIONS = {"comfy-core": "0.30.0", "paradit": "0.1.0"}


@dataclass(frozen=True)
class File:
    """A model file: where it is published, and the folder it belongs in."""

    url: str
    folder: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def line(self) -> str:
        return f"- `models/{self.folder}/` [{self.name}]({self.url})" if "://" in self.url else f"- `models/{self.folder}/` {self.name}"


class Sheet:
    """``info``: the server's /object_info. Nodes are stacked in columns, an upper and a lower row of them."""

    def __init__(self, name: str, info: dict[str, Any]):
        self.name, self.info = name, info
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []
        self.files: dict[str, File] = {}
        self.framed = "ParaDiT: bypass these three to compare with a stock run"
        self._free: dict[tuple[int, bool], int] = {}

    def add(self, kind: str, column: int, lower: bool = False, *, title: str = "", wide: int = 300, **values: Any) -> list[Any]:
        """A node with links ([node, output]), files and values by input name; the rest are defaults. Its first output."""
        found = self.info[kind]
        names = [name for section in ("required", "optional") for name in found["input_order"].get(section, [])]
        unknown = set(values) - set(names)
        assert not unknown, f"{kind} has no {unknown}"
        number = len(self.nodes) + 1
        sockets, widgets, held, files = [], [], [], []
        for name in names:
            section = "required" if name in found["input_order"].get("required", []) else "optional"
            type_, *options = found["input"][section][name]
            options = options[0] if options else {}
            entry: dict[str, Any] = {"name": name, "type": "COMBO" if isinstance(type_, list) else type_}
            if section == "optional":
                entry["shape"] = 7
            if not is_widget(entry["type"]):
                sockets.append(entry | {"link": values.get(name)})
                continue
            widgets.append(entry | {"widget": {"name": name}, "link": None})
            value = values.get(name, default(type_, options))
            if isinstance(value, File):
                files.append(value)
                self.files.setdefault(value.name, value)
                value = value.name
            held += [value, "randomize"] if options.get("control_after_generate") else [value]
        inputs = sockets + widgets
        for slot, entry in enumerate(inputs):
            if isinstance(entry["link"], list):
                entry["link"] = self._link(*entry["link"], number, slot, entry["type"])
        pack = "paradit" if kind.startswith("Para") else "comfy-core"
        properties: dict[str, Any] = {"cnr_id": pack, "ver": VERSIONS[pack], "Node name for S&R": kind}
        published = [{"name": file.name, "url": file.url, "directory": file.folder} for file in files if "://" in file.url]
        if published:
            properties["models"] = published
        height = self._height(sockets, found["output"], widgets, held)
        node = {"id": number, "type": kind, "pos": self._place(column, lower, height), "size": [wide, height], "flags": {}}
        outputs = [
            {"name": name, "type": type_, "links": []} for name, type_ in zip(found["output_name"], found["output"], strict=True)
        ]
        node |= {"order": number - 1, "mode": 0, "inputs": inputs, "outputs": outputs, "properties": properties, "widgets_values": held}
        node |= ({"title": title} if title else {}) | (OURS if pack == "paradit" else {})
        self.nodes.append(node)
        return [number, 0]

    def note(self, text: str, height: int) -> None:
        node = {"id": len(self.nodes) + 1, "type": "MarkdownNote", "pos": [-520, 0], "size": [460, height], "flags": {}}
        node |= {"order": len(self.nodes), "mode": 0, "inputs": [], "outputs": [], "properties": {}, "widgets_values": [text]}
        self.nodes.append(node | NOTE | {"title": "Read me"})

    def text(self) -> str:
        """The file's text: a node and a link a line."""
        group = {"id": 1, "title": self.framed, "bounding": [340, -80, 680, 450]}
        group |= {"color": "#3f789e", "font_size": 24, "flags": {}}

        def lines(items: list) -> str:
            return ",\n".join(f"    {json.dumps(item, ensure_ascii=False)}" for item in items)

        head = {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"paradit/{self.name}")), "revision": 0}
        head |= {"last_node_id": len(self.nodes), "last_link_id": len(self.links)}
        begin = "".join(f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
        end = '  "config": {},\n  "extra": {"ds": {"scale": 0.6, "offset": [660, 200]}},\n  "version": 0.4\n}\n'
        parts = (("nodes", self.nodes), ("links", self.links), ("groups", [group]))
        return "{\n" + begin + "".join(f'  "{name}": [\n{lines(items)}\n  ],\n' for name, items in parts) + end

    def _link(self, source: int, source_slot: int, target: int, slot: int, type_: str) -> int:
        link = len(self.links) + 1
        output = self.nodes[source - 1]["outputs"][source_slot]
        assert output["type"] == type_, f"{output['type']} does not go into {type_}"
        output["links"].append(link)
        self.links.append([link, source, source_slot, target, slot, type_])
        return link

    def _place(self, column: int, lower: bool, height: int) -> list[int]:
        top = self._free.get((column, lower), BELOW if lower else 0)
        self._free[column, lower] = top + height + GAP
        return [360 * min(column, 1) + 340 * max(column - 1, 0) + 20 * max(column - 2, 0), top]

    @staticmethod
    def _height(sockets: list, outputs: list, widgets: list, values: list) -> int:
        text = any(isinstance(value, str) and len(value) > 60 for value in values)
        return 40 + 22 * max(len(sockets), len(outputs)) + 26 * len(values) + (90 if text else 0)


def default(type_: Any, options: dict[str, Any]) -> Any:
    """What a widget shows when its node is made."""
    if "default" in options:
        return options["default"]
    choices = type_ if isinstance(type_, list) else options.get("options")
    if choices:
        first = choices[0]
        return first["key"] if isinstance(first, dict) else first
    return {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False}.get(str(type_), "")
