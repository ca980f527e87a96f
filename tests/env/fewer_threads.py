"""For tests that sample on tiny models over several ranks: a fixture for the conftest files of their folders, and an order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """With more, threads that wait for a core take longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def by_ranks(items: list[pytest.Item]) -> None:
    """Put a file's tests with the same number of ranks together, so that workers are not started over and over."""
    for file in {item.path for item in items}:
        places = [place for place, item in enumerate(items) if item.path == file and "ranks" in _parameters(item)]
        ordered = sorted((items[place] for place in places), key=lambda item: _parameters(item)["ranks"])
        for place, item in zip(places, ordered, strict=True):
            items[place] = item


def _parameters(item: pytest.Item) -> dict:
    return item.callspec.params if hasattr(item, "callspec") else {}
