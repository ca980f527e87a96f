"""Objects that nodes put into a model: ComfyUI takes them out again when the next run loads the model, after ours has begun."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity.inprocess import Job, changed, error, footprint, load, run, sample

from para_core.settings import Attention, Cache, Parallel

pytestmark = pytest.mark.usefixtures("comfy")
TOLERANCE = 1e-5  # relative, per forward, float32
JOB = Job("flux_small", cfg=3.0, tokens=(11, 7), steps=4)
BLOCK = "diffusion_model.single_blocks.3"


class Around(torch.nn.Module):
    """What stands for a block, as compiling nodes of other packs have it."""

    def __init__(self, block: torch.nn.Module):
        super().__init__()
        self._orig_mod, self.calls = block, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self._orig_mod(*args, **kwargs)


def with_object() -> tuple[Any, Around]:
    model = load("flux_small").clone()
    around = Around(load("flux_small").get_model_object(BLOCK))
    model.add_object_patch(BLOCK, around)
    return model, around


@pytest.mark.parametrize(("settings", "cached"), [((Cache(1e9),), 6), ((Parallel(2, batch_degree=1),), 0), ((Parallel(2), Cache(1e9)), 3)])
@pytest.mark.parametrize("ranks", [2])
def test_what_another_run_has_put_into_the_model_is_not_hooked(settings: tuple, cached: int, ranks: int) -> None:
    model = load("flux_small")
    expected, alone = run(model, JOB, *settings)
    before = footprint(model.model.diffusion_model)
    sample(with_object()[0], JOB)
    result, report = run(model, JOB, *settings)
    assert report["notes"] == [] and report["ranks"] == alone["ranks"] and report["cached"] == alone["cached"] == cached
    assert error(result, expected) < TOLERANCE * JOB.steps
    assert not changed(before, footprint(model.model.diffusion_model))


@pytest.mark.parametrize("settings", [(Cache(1e9),), (Cache(1e-9), Attention("pytorch"))])
def test_what_a_node_puts_into_the_model_is_hooked_from_the_first_run_on(settings: tuple) -> None:
    expected, alone = run(load("flux_small"), JOB, *settings)
    model, around = with_object()
    for turn in range(2):
        result, report = run(model, JOB, *settings)
        assert around.calls == (turn + 1) * (report["forwards"] - report["cached"]), "also a block that stands for another is skipped"
        assert report["cached"] == alone["cached"] and error(result, expected) < TOLERANCE * JOB.steps


def test_a_run_leaves_a_model_that_holds_such_an_object_as_it_found_it() -> None:
    model, around = with_object()
    run(model, JOB, Cache(0.2))
    original = load("flux_small").get_model_object(BLOCK)
    assert original is around._orig_mod and not hasattr(around, "_undo") and "forward" not in vars(around) | vars(original)
    sample(load("flux_small"), JOB)
    assert load("flux_small").model.diffusion_model.single_blocks[3] is original
