"""One thread for tests whose ranks are threads, and the record of a full run."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from env.fewer_threads import one_thread

from .record import RESULT, Recorder

__all__ = ["one_thread"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-matrix", action="store_true", help=f"write {RESULT.name} when every run of the matrix has passed")


@pytest.fixture(scope="package")
def recorder(request: pytest.FixtureRequest, comfy: None) -> Iterator[Recorder]:
    """Collects what the runs find; writes it if the option is there and nothing is missing."""
    found, started = Recorder(), time.monotonic()
    yield found
    if request.config.getoption("--record-matrix", default=False):
        found.write(time.monotonic() - started)
