"""Processes: each a life of its own, and nothing of them is left behind whatever ends."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from unit.group.ranks import ROOT, run_ranks

from para_core.group.channel import ChannelClosed
from para_core.group.pool import Pool

STUB = Path(__file__).with_name("stub_worker.py")
START_S = 60.0  # torch is imported in each


@pytest.fixture
def pool() -> Iterator[Pool]:
    made = Pool(STUB)
    yield made
    made.stop()


def within(seconds: float, true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.02)
    return true()


def gone(pid: int) -> bool:
    """Ended and reaped."""
    return not psutil.pid_exists(pid)


def test_starting_takes_no_time_and_leaves_signals_and_log_alone(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    assert threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)}
    with caplog.at_level(logging.INFO):
        begin = time.monotonic()
        worker = pool.start()
        assert time.monotonic() - begin < 1.0
        worker.kill()
        assert not worker.alive()
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert caplog.records == []
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").warning("of another user of the launcher")
    assert len(caplog.records) == 1


def test_directory_key_and_socket_are_for_this_user_alone(pool: Pool) -> None:
    worker = pool.start()
    assert stat.S_IMODE(pool.directory.stat().st_mode) == 0o700
    key = Path(f"{worker.socket_path}.key")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    command = [sys.executable, str(STUB), str(worker.socket_path)]
    assert within(5, lambda: psutil.Process(worker.pid).cmdline() == command)
    secret = json.loads(key.read_text())["authkey"]
    assert secret not in str(psutil.Process(worker.pid).environ())
    assert all(connection.type != "tcp" for connection in psutil.Process(worker.pid).net_connections("inet"))


def test_one_workers_end_ends_no_other_and_is_told_with_its_last_lines(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pool.start(), pool.start()
    monkeypatch.setenv("STUB", "crash")
    crashing = pool.start()
    with pytest.raises(ChannelClosed, match="ended before it answered"):
        crashing.open_channel(START_S)
    assert crashing.exit_code() == 1 and crashing.tail() == "no such card"
    channels = [worker.open_channel(START_S) for worker in (first, second)]
    channels[0].tell("print", "some words")
    assert channels[0].hear(10)[0] == "printed"
    assert first.tail(2) == "some words\nSOME WORDS"
    channels[0].tell("raise", "out of paper")
    with pytest.raises(ChannelClosed):
        channels[0].hear(10)
    assert within(5, lambda: not first.alive()) and first.exit_code() == 1
    assert first.tail(1) == "RuntimeError: out of paper" and len(first.tail(3).splitlines()) == 3
    assert second.alive() and second.exit_code() is None
    channels[1].tell("echo", [1, (2.0, None)])
    assert channels[1].hear(10) == ("echo", [1, (2.0, None)])

    pool.end(first)
    assert pool.workers == [second, crashing] and second.alive()
    pids = [worker.pid for worker in (first, second, crashing)]
    directory = pool.directory
    pool.stop()
    assert all(map(gone, pids)) and not directory.exists() and not pool.workers


def test_a_worker_that_is_stopped_or_deaf_can_be_killed_and_idle_ones_use_no_processor(pool: Pool) -> None:
    stopped, deaf = pool.start(), pool.start()
    stopped.open_channel(START_S)
    channel = deaf.open_channel(START_S)
    process = psutil.Process(deaf.pid)
    before = sum(process.cpu_times()[:2])
    time.sleep(1.0)
    assert sum(process.cpu_times()[:2]) - before <= 0.03
    os.kill(stopped.pid, signal.SIGSTOP)
    channel.tell("deaf")
    for worker in (stopped, deaf):
        assert worker.alive()
        begin = time.monotonic()
        worker.kill()
        assert time.monotonic() - begin < 3 and not worker.alive() and worker.exit_code() == -signal.SIGKILL and gone(worker.pid)


def test_a_pool_can_be_used_again_after_it_was_stopped(pool: Pool) -> None:
    before = pool.directory
    pool.start()
    pool.stop()
    pool.stop()
    assert pool.start().alive() and pool.directory != before


# -- the parent's end -------------------------------------------------------------------------------------------------


def parent_program(rank: int, size: int, report: Path, connected: int) -> None:
    """Starts two workers, and is killed: while they start, or when one is busy and the other stopped."""
    pool = Pool(STUB)
    workers = [pool.start(), pool.start()]
    channels = [worker.open_channel(START_S) for worker in workers[:connected]]
    if connected:
        channels[0].tell("deaf")  # hears no end of file
        os.kill(workers[1].pid, signal.SIGSTOP)
    report.write_text(json.dumps({"pids": [worker.pid for worker in workers], "directory": str(pool.directory)}))
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("connected", [0, 2])
def test_workers_end_within_five_seconds_of_a_killed_parent_and_take_the_directory_along(connected: int, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    run_ranks(parent_program, 1, report, connected, limit_s=START_S)
    begin = time.monotonic()
    left = json.loads(report.read_text())

    def ended(pid: int) -> bool:
        # Where nobody reaps orphans, they stay as zombies.
        return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE

    assert within(5 - (time.monotonic() - begin), lambda: all(map(ended, left["pids"])))
    assert not Path(left["directory"]).exists()


FORGETFUL = """
import sys
from pathlib import Path
sys.path.append(sys.argv[1])
from para_core.group.pool import Pool
pool = Pool(Path(sys.argv[2]))
print(pool.start().pid, pool.directory)
"""


def test_a_pool_that_nobody_stopped_is_gone_with_the_interpreter() -> None:
    done = subprocess.run([sys.executable, "-c", FORGETFUL, ROOT, str(STUB)], capture_output=True, text=True, timeout=START_S)
    pid, directory = done.stdout.split()
    assert done.returncode == 0 and done.stderr == ""
    assert gone(int(pid)) and not Path(directory).exists()


# -- what a sidecar runs ----------------------------------------------------------------------------------------------

SERVE = """
import sys
import nodes
import para_core

def serve(channel, hello, leave):
    channel.tell("seen", {"nodes": nodes.__file__, "para_core": para_core.__file__, "name": __name__, "path": sys.path})
    channel.hear()
"""


def test_a_sidecar_imports_the_library_under_its_own_name_and_hides_no_module_of_comfyui(tmp_path: Path) -> None:
    pack = tmp_path / "custom_nodes" / "any-name.1"
    shutil.copytree(Path(ROOT) / "para_core", pack / "para_core", ignore=shutil.ignore_patterns("__pycache__"))
    (pack / "para_core" / "comfy" / "worker.py").write_text(SERVE)
    (pack / "para_core" / "comfy" / "flags.py").write_text("def adopt(flags): assert flags == {'cpu': True}")
    (pack / "nodes").mkdir()
    (pack / "nodes" / "__init__.py").touch()
    comfyui = tmp_path / "ComfyUI"
    comfyui.mkdir()
    (comfyui / "nodes.py").touch()
    pool = Pool(pack / "para_core" / "sidecar.py")
    try:
        worker = pool.start()
        channel = worker.open_channel(START_S)
        channel.tell("hello", {"root": str(comfyui), "flags": {"cpu": True}, "device": "cpu"})
        kind, seen = channel.hear(10)
    finally:
        pool.stop()
    assert kind == "seen"
    assert seen["nodes"] == str(comfyui / "nodes.py")
    assert seen["para_core"] == str(pack / "para_core" / "__init__.py") and seen["name"] == "para_core.comfy.worker"
    assert seen["path"][-1] == str(pack) and str(pack / "para_core") not in seen["path"]
