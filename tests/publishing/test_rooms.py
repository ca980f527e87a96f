"""The rooms of the library: who may import whom, where ComfyUI may be imported, and how long a file may get."""

from __future__ import annotations

import ast
import re

import pytest
from publishing.checkout import ROOT, python_files, tree

# Lower rooms know nothing of higher ones. Modules at the top of para_core belong to everyone and know no room.
LEVELS = {
    "": 0,
    "plans": 1,
    "sequence": 2,
    "attention": 2,
    "cache": 3,
    "execution": 3,
    "group": 3,
    "vae": 3,
    "comfy": 4,
    "diffusers": 4,
    "nodes": 5,
    "entry": 6,
}
# Rooms of one level that know each other: an exchange is both a layout of tokens and an attention call, and running
# a stack means asking the cache first.
SIDEWAYS = {("sequence", "attention"), ("attention", "sequence"), ("execution", "cache")}
COMFY = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "node_helpers", "nodes", "server"}
LIBRARY = python_files("para_core")
PUBLISHED = [*(["__init__.py"] if (ROOT / "__init__.py").exists() else []), *python_files("nodes", "para_core")]


def room(name: str) -> str:
    """``para_core/plans/flux.py`` -> ``plans``; ``para_core/log.py`` -> ``""``; ``nodes/cache.py`` -> ``nodes``."""
    parts = name.split("/")
    if len(parts) == 1 or name == "para_core/sidecar.py":  # what a process starts with puts the rooms together
        return "entry"
    return parts[0] if parts[0] == "nodes" else parts[1] if len(parts) > 2 else ""


def imports(module: ast.Module, name: str) -> list[tuple[int, str]]:
    """Every imported module with its line; ``from x import y`` counts as ``x.y``.

    Relative ones are spelled from the pack's root with a leading dot: ``.para_core.plans.plan``.

    Imports for the type checker only load nothing and are no arrows.
    """
    for node in ast.walk(module):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    package = name.split("/")[:-1]
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = [*base, *([node.module] if node.module else [])]
            found += [(node.lineno, "." * bool(node.level) + ".".join([*source, alias.name])) for alias in node.names]
    return found


def target_room(target: str) -> str | None:
    """The room of an imported module, None outside the pack."""
    parts = target.lstrip(".").split(".")
    if parts[0] == "nodes" and target.startswith("."):
        return "nodes"
    if parts[0] != "para_core":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in LEVELS else ""


def arrows(module: ast.Module, name: str) -> list[str]:
    """Imports of ``name`` that do not run downward."""
    here, wrong = room(name), []
    for line, target in imports(module, name):
        there = target_room(target)
        if there is None or there == here or there == "" or (here, there) in SIDEWAYS:
            continue
        if LEVELS[there] >= LEVELS[here]:
            wrong.append(f"{name}:{line}: {here or 'para_core'} imports {there}")
    return wrong


def comfy_imports(module: ast.Module, name: str) -> list[str]:
    return [f"{name}:{line}: imports {target}" for line, target in imports(module, name) if target.split(".")[0] in COMFY]


def test_every_folder_of_the_library_is_a_known_room():
    assert {room(name) for name in LIBRARY} <= set(LEVELS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_imports_run_downward(name):
    assert not arrows(tree(name), name)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if room(name) not in ("comfy", "nodes")])
def test_comfyui_is_imported_in_its_rooms_only(name):
    assert not comfy_imports(tree(name), name)


def test_comfyui_s_rooms_leave_torch_distributed_to_the_group():
    """Some builds of torch have none: see ``test_the_published_library_imports_where_torch_has_no_distributed``."""
    rooms = [name for name in PUBLISHED if name.startswith(("nodes/", "para_core/comfy/"))]
    imports = re.compile(r"(?:from|import) torch\.distributed")
    assert rooms and not [name for name in rooms if imports.search((ROOT / name).read_text(encoding="utf-8"))]


@pytest.mark.parametrize("name", LIBRARY)
def test_no_file_of_the_library_is_longer_than_450_lines(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 450


@pytest.mark.parametrize(
    ("name", "line", "wrong"),
    [
        ("para_core/plans/flux.py", "from ..sequence.cut import Cut", True),
        ("para_core/plans/flux.py", "from .plan import Plan", False),
        ("para_core/sequence/hooks.py", "from ..plans.plan import Plan", False),
        ("para_core/sequence/hooks.py", "from ..attention.exchange import Exchange", False),
        ("para_core/attention/backends/sage.py", "from ...sequence import mesh", False),
        ("para_core/attention/backends/sage.py", "from ...cache import rule", True),
        ("para_core/cache/rule.py", "from ..settings import Cache", False),
        ("para_core/cache/rule.py", "from ..group import pool", True),
        ("para_core/cache/rule.py", "from ..execution import runner", True),
        ("para_core/execution/runner.py", "from ..cache import rule", False),
        ("para_core/group/pool.py", "from para_core.comfy.model import build", True),
        ("para_core/group/pool.py", "import para_core.comfy.model", True),
        ("para_core/group/pool.py", "from .. import comfy", True),
        ("para_core/comfy/session.py", "from ..group.pool import Pool", False),
        ("para_core/comfy/session.py", "from ...nodes.parallel import ParaParallel", True),
        ("para_core/log.py", "from .plans import plan", True),
        ("nodes/parallel.py", "from ..para_core.comfy import attach", False),
        ("para_core/group/pool.py", "if TYPE_CHECKING:\n    from ..comfy.model import build", False),
    ],
)
def test_the_check_of_arrows_tells_up_from_down(name, line, wrong):
    assert bool(arrows(ast.parse(line), name)) == wrong


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("import comfy.utils", True),
        ("from comfy_api.latest import io", True),
        ("def f():\n    import folder_paths", True),
        ("import execution", True),
        ("from .execution import graphs", False),
        ("import comfy_kitchen", False),
        ("from ..comfy import model", False),
    ],
)
def test_the_check_of_comfyui_imports_knows_its_modules(line, wrong):
    assert bool(comfy_imports(ast.parse(line), "para_core/group/pool.py")) == wrong


def test_the_entry_point_holds_the_web_directory_and_the_entry_point_only():
    module = tree("__init__.py")
    names = set()
    for statement in module.body:
        if isinstance(statement, ast.Assign):
            names |= {target.id for target in statement.targets if isinstance(target, ast.Name)}
        elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(statement.name)
        elif isinstance(statement, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in statement.names}
    assert names - {"annotations", "__all__"} == {"WEB_DIRECTORY", "comfy_entrypoint"}
