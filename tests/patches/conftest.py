from __future__ import annotations

from pathlib import Path

import pytest
from env.fewer_threads import by_ranks, one_thread

__all__ = ["one_thread"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    by_ranks(items, Path(__file__).parent)
