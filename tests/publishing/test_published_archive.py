"""What the published archive holds, and every line in it that a registry scanner would stop at."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile

import pytest
from publishing.checkout import ROOT, build_archive, tracked

TEXT = (".py", ".js", ".md", ".json", ".toml", ".txt")

# What reviewers and scanners look for, by the name used in ALLOWED and in the README.
PATTERNS = {
    "process": r"\bimport subprocess|\bfrom subprocess|subprocess\.\w+\(|\bos\.(system|popen|exec\w*|spawn\w*|fork\w*)\(",
    "socket": r"socket\.(socket|create_connection|create_server|socketpair)\(",
    "connect": r"\.connect\(",
    "bind": r"\.bind\(",
    "send": r"\.send\(",
    "environment": r"\bos\.(environ|getenv|putenv|unsetenv)\b|\bfrom os import .*\b(environ|getenv|putenv)\b",
    "evaluation": r"(?<![\w.])(eval|exec|__import__)\(|\bnew Function\(",
    "pickle": r"\b(import|from) (c?pickle|dill|marshal|shelve)\b|(pickle|dill|marshal)\.loads?\(|\btorch\.load\(|\ballow_pickle=True",
    "object": r"\b\w*(send|recv|broadcast|gather|scatter)_object(_list)?\(|\b\w*conn\w*\.recv\(",
    "request": r"\brequests\.(get|post|put|patch|delete|head|request|Session)\b|\burllib\b|\bhttp\.client\b|\baiohttp\.ClientSession",
    "fetch": r"\bfetch\(|\bXMLHttpRequest\b|\bnew WebSocket\b",
    "route": r"\.routes\.\w+\(|\badd_routes\(",
    "obfuscation": r"\bb(64|32|85)decode\(|\bcodecs\.decode\(|\bzlib\.decompress\(|\bgetattr\((os|sys|builtins|subprocess),",
}

# (file, pattern): why it is there. Each entry is named with its file in the README's Security section.
ALLOWED: dict[tuple[str, str], str] = {
    ("para_core/group/communicator.py", "environment"): "NCCL takes no other word on where to listen, how not to send, and what to share",
    ("para_core/group/gloo.py", "send"): "a collective of torch's process group: one rank's tensor to another, over loopback",
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> dict[str, bytes]:
    path = build_archive(tmp_path_factory.mktemp("published") / "node.zip")
    with zipfile.ZipFile(path) as built:
        return {name: built.read(name) for name in built.namelist()}


def _hits(files: dict[str, bytes]) -> dict[tuple[str, str], list[str]]:
    """Lines that match a pattern, comments and docstrings included."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, content in files.items():
        if not name.endswith(TEXT):
            continue
        for number, line in enumerate(content.decode("utf-8").splitlines(), 1):
            for pattern, expression in PATTERNS.items():
                if re.search(expression, line):
                    found.setdefault((name, pattern), []).append(f"{name}:{number}: [{pattern}] {line.strip()}")
    return found


def _security_section() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Security\n")[2].partition("\n## ")[0]


def test_every_line_a_scanner_would_stop_at_is_on_the_allow_list(archive):
    lines = [line for entry, lines in _hits(archive).items() if entry not in ALLOWED for line in lines]
    assert not lines, "not on the allow-list:\n" + "\n".join(lines)


def test_the_allow_list_names_nothing_that_is_gone():
    assert set(ALLOWED) <= set(_hits({name: (ROOT / name).read_bytes() for name, _ in ALLOWED}))


def test_every_allowed_exception_is_named_in_the_security_section():
    section = _security_section()
    assert section
    exceptions = section.partition("Each exception it allows is named here:")[2]
    assert not [entry for entry, reason in ALLOWED.items() if not reason or f"\n- `{entry[0]}` " not in exceptions]
    assert len({name for name, _ in ALLOWED}) == exceptions.count("\n- `"), "one line for each file on the list, `None.` if it is empty"


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        ("process", "subprocess.Popen([sys.executable])"),
        ("process", 'os.system("ls")'),
        ("socket", "s = socket.socket(socket.AF_INET)"),
        ("connect", "node.connect(0, other, 0)"),
        ("bind", "this.draw.bind(this)"),
        ("send", "channel.send(message)"),
        ("environment", 'os.environ["NCCL_SOCKET_IFNAME"] = "lo"'),
        ("evaluation", "eval(text)"),
        ("pickle", "torch.load(path)"),
        ("object", "dist.broadcast_object_list(items)"),
        ("request", "requests.get(url)"),
        ("request", "urllib.request.urlopen(url)"),
        ("route", '@PromptServer.instance.routes.get("/x")'),
    ],
)
def test_the_scan_finds(pattern, line):
    assert ("x.py", pattern) in _hits({"x.py": line.encode()})


@pytest.mark.parametrize(
    "line", ["model.eval()", "connection.send_bytes(data)", "comm.isend(tensor)", "re.compile(text)", "requests.append(1)"]
)
def test_the_scan_does_not_take_harmless_code_for_harmful(line):
    assert not _hits({"x.py": line.encode()})


def test_tests_and_workshop_files_are_not_published(archive):
    workshop = ("tests/", ".ci/", ".github/", "demo-output/", "Makefile", ".gitignore", ".comfyignore")
    assert not [name for name in archive if name.startswith(workshop)]


def test_everything_a_user_needs_is_published(archive):
    needed = {"__init__.py", "LICENSE", "README.md", "pyproject.toml", "requirements.txt", "workflows/flux.json", "workflows/wan_t2v.json"}
    assert not needed - set(archive)


def test_the_archive_holds_text_and_thumbnails_only(archive):
    assert not [name for name in archive if not name.endswith((*TEXT, ".jpg")) and name != "LICENSE"]
    assert sum(map(len, archive.values())) < 2_000_000


IMPORTS = """
import importlib, pkgutil, sys
import para_core
skipped = ("para_core.comfy", "para_core.attention.packing_kernels")  # the latter is Triton's
for module in pkgutil.walk_packages(para_core.__path__, "para_core."):
    if not module.name.startswith(skipped) and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""
WITHOUT_CUDA = """
import torch
assert not torch.cuda.is_initialized(), "importing the library initialised CUDA"
assert not {"comfy", "server", "folder_paths"} & set(sys.modules), "importing the library imported ComfyUI"
"""
EMPTY_DISTRIBUTED = """
import sys, torch.distributed
for name in [name for name in vars(torch.distributed) if not name.startswith("__")]:
    delattr(torch.distributed, name)
for name in [name for name in sys.modules if name.startswith("torch.distributed.")]:
    del sys.modules[name]
torch.distributed.__path__ = []
torch.distributed.is_available = lambda: False
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory, archive):
    """A folder that holds the published library and nothing else."""
    folder = tmp_path_factory.mktemp("library")
    for name, content in archive.items():
        if name.startswith("para_core/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    return folder


def check(script, library):
    # -P keeps the working directory (the checkout) off the path, so that only the archive is found
    command = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(library)!r})\n{script}"]
    done = subprocess.run(command, cwd=library, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_published_library_imports_without_comfyui_and_without_cuda(library):
    check(IMPORTS + WITHOUT_CUDA, library)


def test_the_published_library_imports_where_torch_has_no_distributed(library):
    """As in AMD's build for Windows, where ``torch.distributed`` is empty."""
    check(EMPTY_DISTRIBUTED + IMPORTS, library)


def test_no_package_registry_is_named_in_the_project():
    # written in two halves, so that this file does not name them either
    halves = (
        ("pypi", ".org"), ("pypi", ".nvidia"), ("python", "hosted.org"), ("npm", "js."), ("registry", ".yarn"), ("anaconda", ".org"),
        ("download.", "pytorch.org"), ("crates", ".io"), ("proxy.", "golang"),
    )  # fmt: skip
    hosts = re.compile("|".join(re.escape(first + second) for first, second in halves))
    assert not [name for name in tracked() if hosts.search((ROOT / name).read_text(encoding="utf-8", errors="ignore"))]


def test_no_file_names_a_folder_of_one_developers_machine():
    home = re.compile(r"(?<![\w.])/(root|home/\w+|Users/\w+)/")
    assert not [name for name in tracked() if home.search((ROOT / name).read_text(encoding="utf-8", errors="ignore"))]
