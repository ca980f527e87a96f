"""A real ComfyUI server, started through its own main.py, and a client for it.

    with Server() as server:
        result = server.run(graphs.flux())
        latent = result.latent()

The server gets a base folder of its own with links to the pack, the test nodes and the tiny models; the trained one in
tests/assets is found too. It listens on a
free loopback port, and it and whatever it started is gone when the `with` block ends.

ComfyUI keeps results between prompts: nodes whose inputs did not change are not run again. `free()` empties that cache.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import websocket

from .prepare import CHECKOUT, HERE, Environment

Graph = Mapping[str, Mapping[str, Any]]
Message = dict[str, Any]
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
RUN_REPORT = re.compile(r"\[ParaDiT\] run: (\{.*\})")
PROGRESS_TEXT = 3  # ComfyUI's BinaryEventTypes.TEXT
FINAL = {"execution_success": "success", "execution_error": "error", "execution_interrupted": "interrupted"}


class ServerError(RuntimeError):
    """The server did not start, refused a prompt or went away. The message ends with its last log lines."""


class PromptError(RuntimeError):
    """A prompt did not end in success."""


@dataclass
class Result:
    """One finished prompt: its /history entry, and the websocket messages about it, with a `time` in seconds each."""

    prompt_id: str
    status: str  # success, error or interrupted
    history: dict[str, Any]
    messages: list[Message]
    output_folder: Path

    @property
    def error(self) -> str:
        """What the failing node raised; empty when nothing did."""
        for message in self.messages:
            if message["type"] == "execution_error":
                data = message["data"]
                return f"{data['node_type']}: {data['exception_type']}: {data['exception_message'].strip()}"
        return "" if self.status == "success" else self.status

    def check(self) -> Result:
        if self.status != "success":
            raise PromptError(self.error)
        return self

    def files(self, node: str, kind: str) -> list[Path]:
        """Paths of the files that an output node saved, in order."""
        entries = self.history["outputs"].get(node, {}).get(kind, [])
        return [self.output_folder / entry["subfolder"] / entry["filename"] for entry in entries]

    def latent(self, node: str = "latent"):
        """The latent [B, C, ..., H, W] that this SaveLatent node wrote."""
        from safetensors.torch import load_file

        (path,) = self.files(node, "latents")
        return load_file(path)["latent_tensor"]

    def images(self, node: str = "image") -> list[Path]:
        return self.files(node, "images")

    def text(self, node: str) -> str:
        return "".join(self.history["outputs"].get(node, {}).get("text", []))

    def progress(self, node: str = "sampler") -> list[tuple[float, int, int]]:
        """(time, step, steps) of every progress message of a node."""
        data = ((m["time"], m["data"]) for m in self.messages if m["type"] == "progress")
        return [(time, d["value"], d["max"]) for time, d in data if d["node"] == node]

    def executed(self) -> set[str]:
        """Nodes that ran, as opposed to those whose cached result was taken."""
        return {m["data"]["node"] for m in self.messages if m["type"] == "executing"} - {None}


@dataclass
class _Prompt:
    messages: list[Message] = field(default_factory=list)
    status: str = ""
    done: bool = False
    listener: Callable[[Message], None] | None = None


class Server:
    """Boots on construction; raises ServerError when that fails. Not more than one client should use it at a time."""

    def __init__(
        self,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        *,
        pack: Path | None = CHECKOUT,
        boot_timeout: float = 120.0,
    ) -> None:
        self.environment = Environment.locate()
        self.environment.tmp.mkdir(parents=True, exist_ok=True)
        self.base = Path(tempfile.mkdtemp(prefix="server-", dir=self.environment.tmp))
        self.log = self.base / "server.log"
        self.port = _free_port()
        self.client_id = uuid.uuid4().hex
        self._prompts: dict[str, _Prompt] = {}
        self._changed = threading.Condition()
        self.texts: list[tuple[str, str]] = []
        """Progress texts so far: (node, text)."""
        self._connected = False
        self._final_log = ""
        packs = self._link_folders(pack)
        self.process = self._start(packs, args, env or {})
        try:
            self._wait_until_ready(boot_timeout)
            self._socket = websocket.create_connection(
                f"ws://127.0.0.1:{self.port}/ws?clientId={self.client_id}", timeout=30
            )
            self._socket.settimeout(None)
        except BaseException:
            self.stop()
            raise
        self._connected = True
        self._reader = threading.Thread(target=self._read, name="comfyui-websocket", daemon=True)
        self._reader.start()

    # -- prompts ------------------------------------------------------------------------------------------------

    def queue(self, graph: Graph, listener: Callable[[Message], None] | None = None) -> str:
        """Queue an API-format graph and return its prompt id. `listener` gets each message on the reader thread."""
        prompt_id = str(uuid.uuid4())
        self._prompts[prompt_id] = _Prompt(listener=listener)
        self.post("/prompt", {"prompt": graph, "prompt_id": prompt_id, "client_id": self.client_id})
        return prompt_id

    def wait(self, prompt_id: str, timeout: float = 120.0) -> Result:
        """Wait until a queued prompt has ended, in whichever way."""
        prompt = self._prompts[prompt_id]
        with self._changed:
            ended = self._changed.wait_for(lambda: prompt.done or not self._connected, timeout)
        if not ended:
            raise self._failure(f"the prompt did not end within {timeout:.0f} s")
        if not prompt.done:
            raise self._failure("the server went away during a prompt")
        history = self.get(f"/history/{prompt_id}")[prompt_id]
        return Result(prompt_id, prompt.status, history, prompt.messages, self.base / "output")

    def run(self, graph: Graph, timeout: float = 120.0, listener: Callable[[Message], None] | None = None) -> Result:
        """Queue a graph and wait for its end. See Result.check() for an exception when it failed."""
        return self.wait(self.queue(graph, listener), timeout)

    def interrupt(self) -> None:
        """Cancel the running prompt."""
        self.post("/interrupt", {})

    def free(self, unload_models: bool = True, free_memory: bool = True) -> None:
        """The menu's "free model and node cache". The server does it between prompts, not before this returns."""
        self.post("/free", {"unload_models": unload_models, "free_memory": free_memory})

    def object_info(self, node_id: str) -> dict[str, Any]:
        """The schema of a node class as the browser gets it; {} when there is no such node."""
        return self.get(f"/object_info/{node_id}").get(node_id, {})

    # -- plain HTTP ---------------------------------------------------------------------------------------------

    def get(self, path: str) -> Any:
        return self._request(path, None)

    def post(self, path: str, body: Any) -> Any:
        return self._request(path, json.dumps(body).encode())

    def _request(self, path: str, body: bytes | None) -> Any:
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                answer = response.read()
        except urllib.error.HTTPError as error:
            raise ServerError(f"{path}: {error.code}: {_readable(error.read())}") from None
        except OSError as error:
            raise self._failure(f"{path}: {error}") from error
        return json.loads(answer) if answer else None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # -- life ---------------------------------------------------------------------------------------------------

    def log_text(self) -> str:
        """Everything the server printed so far, without colours."""
        if not self.log.exists():
            return self._final_log
        return COLOURS.sub("", self.log.read_text(errors="replace"))

    def log_tail(self, lines: int = 15) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])

    def reports(self) -> list[dict[str, Any]]:
        """What the pack logged about each sampling run so far: ranks, degrees, steps, forwards, cached, ..."""
        return [json.loads(line) for line in RUN_REPORT.findall(self.log_text())]

    def stop(self) -> None:
        """End the server as Ctrl-C would, then by force, and remove its folder. The log stays readable."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self._final_log = self.log_text()
        shutil.rmtree(self.base, ignore_errors=True)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _link_folders(self, pack: Path | None) -> list[str]:
        for name in ("input", "output", "user", "temp", "custom_nodes"):
            (self.base / name).mkdir()
        (self.base / "models").symlink_to(self.environment.models)
        trained = {"base_path": str(HERE.parent / "assets"), "diffusion_models": ".", "vae": "."}
        (self.base / "trained.yaml").write_text(json.dumps({"trained": trained}))  # JSON is YAML
        packs = {"nodes_testing": HERE / "nodes_testing"} | ({"paradit": pack} if pack else {})
        for name, folder in packs.items():
            (self.base / "custom_nodes" / name).symlink_to(folder)
        return list(packs)

    def _start(self, packs: Sequence[str], args: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "main.py", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        command += ["--extra-model-paths-config", str(self.base / "trained.yaml")]
        command += ["--disable-api-nodes", "--disable-all-custom-nodes", "--whitelist-custom-nodes", *packs]
        if not _has_cuda():
            command.append("--cpu")
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [*command, *args],
                cwd=self.environment.comfyui,
                env=self.environment.variables() | {"PYTHONUNBUFFERED": "1"} | dict(env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # a shell's background jobs ignore Ctrl-C, and so would a server that is started by one
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def _wait_until_ready(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise self._failure(f"the ComfyUI server ended with code {self.process.returncode} while starting")
            try:
                urllib.request.urlopen(self.url + "/queue", timeout=5).close()
                return
            except OSError:
                time.sleep(0.1)
        raise self._failure(f"the ComfyUI server did not start within {timeout:.0f} s")

    def _read(self) -> None:
        """Sort websocket messages by prompt until the connection ends. Of the binary ones, progress texts are kept."""
        try:
            while frame := self._socket.recv():
                if isinstance(frame, str):
                    self._sort(json.loads(frame) | {"time": time.monotonic()})
                elif int.from_bytes(frame[:4], "big") == PROGRESS_TEXT:
                    border = 8 + int.from_bytes(frame[4:8], "big")
                    self.texts.append((frame[8:border].decode(), frame[border:].decode()))
        except (websocket.WebSocketException, OSError):
            pass
        with self._changed:
            self._connected = False
            self._changed.notify_all()

    def _sort(self, message: Message) -> None:
        kind, data = message["type"], message["data"]
        prompt = self._prompts.get(data.get("prompt_id", ""))
        if prompt is None:
            return
        prompt.messages.append(message)
        prompt.status = FINAL.get(kind, prompt.status)
        if prompt.listener is not None:
            prompt.listener(message)
        if kind == "executing" and data["node"] is None:  # sent last, when the history entry is written
            with self._changed:
                prompt.done = True
                self._changed.notify_all()

    def _failure(self, sentence: str) -> ServerError:
        return ServerError(f"{sentence}\n{self.log_tail()}")


def _readable(answer: bytes) -> str:
    """ComfyUI's reasons for refusing a prompt, in one line; other answers as they are."""
    try:
        body = json.loads(answer)
        details = [e["details"] or e["message"] for node in body["node_errors"].values() for e in node["errors"]]
        return "; ".join([f"{body['error']['message']} {body['error']['details']}".strip(), *details])
    except (ValueError, KeyError, TypeError, AttributeError):
        return answer.decode(errors="replace")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
