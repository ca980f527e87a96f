"""Fixtures: the real ComfyUI server, and ComfyUI's modules imported into the test process."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from env import comfy_import
from env.fewer_threads import by_ranks
from env.prepare import Environment
from env.server import Server
from hypothesis import HealthCheck, settings

# What takes long on a machine that does other things as well has not failed.
settings.register_profile("paradit", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("paradit")


@pytest.fixture(scope="session")
def comfy() -> Iterator[None]:
    """Makes `import comfy.*` work inside the test; import within the test function, after this fixture."""
    comfy_import.boot_comfy()
    yield


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One server for the whole session. Tests that stop it, or need flags of their own, start another Server.

    One thread a process: with tiny models on few cores, threads that wait for each other cost more than they bring.
    """
    with Server(env={"OMP_NUM_THREADS": "1"}) as running:
        yield running


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """A failed test that used the server shows the end of its log."""
    report = yield
    running = getattr(item, "funcargs", {}).get("server")
    if report.failed and isinstance(running, Server):
        report.sections.append(("end of the ComfyUI log", running.log_tail(40)))
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    by_ranks(items)


def pytest_report_header() -> str:
    return f"ComfyUI: {Environment.locate().comfyui}, Python {sys.version.split()[0]}"
