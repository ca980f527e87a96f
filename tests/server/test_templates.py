"""Every template as it is shipped runs through the real server, on the tiny model of its family and on two ranks."""

from __future__ import annotations

import functools

import pytest
from env import templates
from env.server import Server
from families.ranks import error


def test_every_template_has_a_tiny_model() -> None:
    assert set(templates.CASES) == {path.stem for path in (templates.ROOT / "workflows").glob("*.json")}


@pytest.mark.parametrize("name", templates.CASES)
def test_template_runs_on_two_ranks_and_gives_what_the_bypassed_one_gives(server: Server, name: str) -> None:
    schema = functools.lru_cache(server.object_info)
    stock = templates.tiny(name, schema, gpus=0)
    assert not any(node["class_type"].startswith("Para") for node in stock.values())
    accelerated = templates.tiny(name, schema, gpus=2)
    ends = [end for end in ("latent", "sound") if end in stock]
    expected = server.run(stock).check()
    before = len(server.reports())
    result = server.run(accelerated).check()
    (report,) = server.reports()[before:]
    if any(node["class_type"] == "ParaAccelerate" for node in accelerated.values()):  # does not split on the CPU, and says so
        assert report["ranks"] == 1 and len(report["notes"]) == 1 and report["backend"] == "auto" and report["steps"] == 2
    else:
        assert report["ranks"] == 2 and report["notes"] == [] and report["steps"] == 2
    assert error([result.latent(end) for end in ends], [expected.latent(end) for end in ends]) < 1e-5 * 2 * report["forwards"]
