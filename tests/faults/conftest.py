"""The group under test: its workers are kept from test to test, because starting one takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def _group_of_the_session(comfy) -> Iterator[None]:
    from para_core.comfy import sidecars

    yield
    sidecars.group().close()


@pytest.fixture
def group(_group_of_the_session):
    """The group of sidecars of this process, with its usual timeouts at the start and the end of the test."""
    from para_core.comfy import sidecars
    from para_core.group.group import Timeouts

    found = sidecars.group()
    yield found
    vars(found).pop("step", None)
    found.timeouts = Timeouts()


@pytest.fixture
def group_running(_group_of_the_session, monkeypatch):
    """Puts a new group, whose workers run the given script, in place of the usual one."""
    from para_core.comfy import sidecars
    from para_core.group.group import Group

    made: list[Group] = []

    def make(script: Path) -> Group:
        made.append(Group(script, sidecars._hello))
        monkeypatch.setattr(sidecars, "_group", made[-1])
        return made[-1]

    yield make
    for one in made:
        one.close()
