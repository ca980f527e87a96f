"""The checkout as the tests here see it: what git tracks, what gets published, and what the nodes declare."""

from __future__ import annotations

import ast
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WIDGET_TYPES = {"Int", "Float", "String", "Boolean", "Combo"}


def _git(*arguments: str) -> set[str]:
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files", "-z", *arguments]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")) - {""}


def tracked() -> list[str]:
    """Files that git tracks (paths from the root), without those deleted in the working tree."""
    return sorted(name for name in _git() if (ROOT / name).is_file())


def published() -> list[str]:
    """Tracked files minus the patterns of .comfyignore, which have git's own syntax."""
    ignored = _git("--cached", "--ignored", "--exclude-from=.comfyignore")
    return [name for name in tracked() if name not in ignored]


def build_archive(path: Path) -> Path:
    """The archive as the publish command makes it: a zip of the published files."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in published():
            archive.write(ROOT / name, name)
    return path


def python_files(*folders: str) -> list[str]:
    """Python files in these folders of the working tree, tracked or not yet."""
    return sorted(str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py"))


def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), filename=name)


@dataclass(frozen=True)
class Node:
    """A node's schema as its source declares it. ``inputs``: (type, name) in order, such as ("Int", "gpus")."""

    id: str
    file: str
    display_name: str
    category: str
    inputs: tuple[tuple[str, str], ...]
    tooltips: frozenset[str]

    @property
    def widgets(self) -> list[str]:
        return [name for type_, name in self.inputs if type_ in WIDGET_TYPES]


def _literal(call: ast.Call, keyword: str) -> str:
    value = next((item.value for item in call.keywords if item.arg == keyword), None)
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""


def _node(file: str, schema: ast.Call) -> Node:
    inputs = next((item.value for item in schema.keywords if item.arg == "inputs"), ast.List(elts=[]))
    found, tooltips = [], set()
    for call in inputs.elts if isinstance(inputs, ast.List) else []:
        # io.Int.Input("gpus", default=0, tooltip="...")
        assert isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute), f"{file}: an input is not declared in place"
        assert call.func.attr == "Input" and isinstance(call.func.value, ast.Attribute), f"{file}: an input is not declared in place"
        name = call.args[0]
        assert isinstance(name, ast.Constant), f"{file}: an input's name is not a literal"
        found.append((call.func.value.attr, name.value))
        if any(item.arg == "tooltip" for item in call.keywords):
            tooltips.add(name.value)
    return Node(
        _literal(schema, "node_id"), file, _literal(schema, "display_name"), _literal(schema, "category"), tuple(found), frozenset(tooltips)
    )


def nodes() -> dict[str, Node]:
    """Every node declared in nodes/, by id. Ids are read as literals, as ComfyUI Manager reads them."""
    found = {}
    for file in python_files("nodes"):
        for call in ast.walk(tree(file)):
            if isinstance(call, ast.Call) and any(item.arg == "node_id" for item in call.keywords):
                node = _node(file, call)
                assert node.id, f"{file}: node_id is not a literal string"
                found[node.id] = node
    return found
