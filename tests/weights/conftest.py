"""One folder of model files for all tests of weights."""

from __future__ import annotations

import pytest

from .files import Folder


@pytest.fixture(scope="session")
def folder(comfy, tmp_path_factory) -> Folder:
    return Folder(tmp_path_factory.mktemp("models"))
