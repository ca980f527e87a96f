"""Sidecars that nobody needs: gone with their parent, freed with its models, idle without cost, gone after a while."""

from __future__ import annotations

import gc
import ipaddress
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import psutil
from env import graphs
from env.prepare import Environment
from env.server import Server
from faults.sampling import Prompt, check_full, sample, scripts
from parity.inprocess import load

WAN_BYTES = 32e6  # the tiny Wan model


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def held(group) -> bool:
    """Whether any worker has a model."""
    return any(member.models for member in group.members)


@contextmanager
def freed(group) -> Iterator[None]:
    """The body has models freed; it ends once the group's own thread has told the workers."""
    told, done = group._drop_unwanted, threading.Event()

    def tell() -> None:
        told()
        if not held(group):
            done.set()

    with patch.object(group, "_drop_unwanted", tell):
        yield
        assert done.wait(60), "nobody told them"


def sidecars_of(pid: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(pid).children() if any("sidecar.py" in word for word in child.cmdline())]


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def listening(processes: list[psutil.Process]) -> set[str]:
    """Addresses that these processes listen on."""
    return {
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }


def test_workers_and_their_directory_are_gone_5_seconds_after_their_parent_is_killed(record_property) -> None:
    command = [sys.executable, str(scripts() / "endless.py"), "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=Environment.locate().variables()) as parent:
        try:
            assert parent.stdout is not None
            told = json.loads(parent.stdout.readline())
            assert len(alive(told["pids"])) == 1 and Path(told["directory"]).is_dir()
            time.sleep(0.3)
        finally:
            os.kill(parent.pid, signal.SIGKILL)
    killed = time.monotonic()
    assert within(5, lambda: not alive(told["pids"])), alive(told["pids"])
    record_property("seconds to the end of the workers", round(time.monotonic() - killed, 2))
    assert within(5 - (time.monotonic() - killed), lambda: not Path(told["directory"]).exists())


def test_idle_workers_use_no_cpu_and_listen_on_loopback_only(group) -> None:
    check_full(Prompt())
    workers = [psutil.Process(pid) for pid in group.pids]
    time.sleep(0.5)
    before = [sum(worker.cpu_times()[:2]) for worker in workers]
    time.sleep(2.0)
    for worker, used in zip(workers, before, strict=True):
        assert sum(worker.cpu_times()[:2]) - used < 0.025  # two ticks of the clock that counts
    assert all(ipaddress.ip_address(address).is_loopback for address in listening([psutil.Process(), *workers]))


def test_unloaded_models_are_freed_in_the_workers_and_sent_again_when_needed(group) -> None:
    import comfy.model_management

    check_full(Prompt())
    models = group.counts["models"]
    check_full(Prompt())
    assert group.counts["models"] == models
    with freed(group):
        comfy.model_management.unload_all_models()
    check_full(Prompt())
    assert group.counts["models"] == models + 1


def test_sidecars_are_freed_on_request_whatever_became_of_the_model_on_the_first_rank(group) -> None:
    import comfy.model_management

    from para_core.comfy.attach import attach
    from para_core.settings import Parallel

    model = attach(load("flux"), Parallel(2))
    sample(model, Prompt())
    del model  # a node's result that ComfyUI keeps no longer
    gc.collect()
    with freed(group):
        comfy.model_management.unload_all_models()

    check_full(Prompt())
    comfy.model_management.unload_model_and_clones(load("flux"))  # as where its card needs room for another
    with group._lock:
        group._drop_unwanted()
    assert held(group)
    with freed(group):
        comfy.model_management.unload_all_models()
    check_full(Prompt())
    check_full(Prompt())
    loaded = [patcher for patcher in comfy.model_management.loaded_models() if patcher is not None]  # None: gone, and not tidied up yet
    names = [type(patcher.model).__name__ for patcher in loaded]
    assert names.count("Sidecars") == 1


def test_workers_leave_after_a_while_without_prompts_and_are_started_again(group) -> None:
    check_full(Prompt())
    pids, directory = group.pids, group._pool.directory
    group.timeouts.idle = 1.0
    group.end()
    assert within(60, lambda: not alive(pids) and not directory.exists())
    group.timeouts.idle = 900.0
    check_full(Prompt())
    assert not set(group.pids) & set(pids)


def test_workers_get_ready_while_nobody_waits_for_them_and_leave_if_nobody_comes(group_running) -> None:
    """As where a node starts them, and its prompt is cancelled before it samples."""
    from para_core.comfy import sidecars

    group = group_running(sidecars.SCRIPT)
    group.warm(["cpu"])
    (member,) = group.members
    assert within(60, lambda: not member.replies.empty()), "it has imported what it needs"
    group.timeouts.idle = 0.5
    group._watch.wake()
    assert within(60, lambda: not alive([member.process.pid])) and not group.members


def test_a_worker_that_ends_before_a_run_looks_for_it_is_replaced(group_running) -> None:
    from para_core.comfy import sidecars

    group = group_running(sidecars.SCRIPT)
    group.warm(["cpu"])
    (member,) = group.members
    assert within(60, lambda: not member.replies.empty())
    warm = group.warm

    def killed(devices: list[str]) -> None:
        warm(devices)
        if group.members == [member]:
            member.process.kill()
            assert within(10, lambda: not member.reachable)

    with patch.object(group, "warm", killed):
        check_full(Prompt())
    assert group.members != [member] and group.counts["starts"] == 2


def test_a_server_finishes_a_prompt_without_its_worker_frees_the_next_on_request_and_leaves_nothing_behind() -> None:
    graph, seed_2 = (graphs.wan([graphs.parallel(2)], graphs.Sampling(steps=3, seed=seed)) for seed in (1, 2))
    with Server() as server:
        expected = server.run(graphs.wan(sampling=graphs.Sampling(steps=3, seed=1))).check().latent()

        def kill(message) -> None:
            if message["type"] == "progress" and message["data"]["value"] == 1:
                for worker in sidecars_of(server.process.pid):
                    worker.kill()

        result = server.run(graph, listener=kill).check()
        assert ((result.latent() - expected).norm() / expected.norm()).item() < 3e-5 and len(result.progress()) == 3
        (note,) = server.reports()[-1]["notes"]
        assert "rank 1 on cpu was ended by SIGKILL" in note and server.log_text().count(note) == 2  # as a warning, in the report

        server.run(seed_2).check()
        (worker,) = sidecars_of(server.process.pid)
        directory = Path(worker.cmdline()[-1]).parent
        assert directory.is_dir() and directory.stat().st_mode & 0o777 == 0o700
        full = worker.memory_full_info().uss

        def gone() -> bool:
            server.free()  # a request that comes while ComfyUI tidies up after a prompt is not seen before the next one
            return worker.memory_full_info().uss < full - 0.8 * WAN_BYTES

        assert within(60, gone), server.log_tail(40)
        again = server.run(graph).check()
        assert "sampler" in again.executed() and ((again.latent() - expected).norm() / expected.norm()).item() < 3e-5
        assert [(report["ranks"], report["notes"]) for report in server.reports()[-2:]] == [(2, [])] * 2
        assert [process.pid for process in sidecars_of(server.process.pid)] == [worker.pid]

        tree = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
        assert all(ipaddress.ip_address(address).is_loopback for address in listening(tree))
        server.process.send_signal(signal.SIGINT)
        server.process.wait(15)
        assert within(5, lambda: not alive([process.pid for process in tree]) and not directory.exists())
