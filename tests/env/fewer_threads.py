"""For folders of tests that sample on tiny models over several ranks: a fixture, and an order, for their conftest files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """With more, threads that wait for a core take longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def by_ranks(items: list[pytest.Item], folder: Path) -> None:
    """Put a file's tests with the same number of ranks together, so that workers are not started over and over."""
    for file in {item.path for item in items if item.path.parent == folder}:
        places = [place for place, item in enumerate(items) if item.path == file and "ranks" in _parameters(item)]
        ordered = sorted((items[place] for place in places), key=lambda item: _parameters(item)["ranks"])
        for place, item in zip(places, ordered, strict=True):
            items[place] = item


def _parameters(item: pytest.Item) -> dict:
    return item.callspec.params if hasattr(item, "callspec") else {}
