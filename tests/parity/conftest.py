"""Order of the tests here: those with the same number of ranks together, so that workers are not started over and over.

And one thread for the tiny models: with more, threads that wait for a core take longer than the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for file in {item.path for item in items if item.path.parent == here}:
        places = [place for place, item in enumerate(items) if item.path == file and "ranks" in _parameters(item)]
        ordered = sorted((items[place] for place in places), key=lambda item: _parameters(item)["ranks"])
        for place, item in zip(places, ordered, strict=True):
            items[place] = item


def _parameters(item: pytest.Item) -> dict:
    return item.callspec.params if hasattr(item, "callspec") else {}
