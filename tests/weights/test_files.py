"""Models that a card cannot hold: every sidecar opens the file itself. Without a GPU rank 0 is told that it cannot hold them."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from parity.inprocess import error, run, sample

from para_core.settings import Parallel

from .cases import CASES
from .files import Folder
from .test_weights import JOB, PLAIN, prepared, prepared_on, state

pytestmark = pytest.mark.usefixtures("comfy")
LORA = "LoRA, alone and in a stack [stack]"


def named(word: str) -> str:
    return next(name for name in CASES if word in name)


def slowly(*words: str) -> list[Any]:
    return [pytest.param(named(word), marks=pytest.mark.slow) for word in words]


@pytest.fixture
def offloaded(monkeypatch) -> None:
    from para_core.comfy import files

    monkeypatch.setattr(files, "offloaded", lambda patcher, working: True)


def counts() -> dict[str, int]:
    from para_core.comfy import sidecars

    return dict(sidecars.group().counts)


def same(model: Any, result: torch.Tensor, report: dict[str, Any]) -> bool:
    return report["notes"] == [] and report["ranks"] == 2 and error(result, sample(model, JOB)) < 1e-5 * JOB.steps


@pytest.mark.parametrize("name", [PLAIN, LORA, *slowly("[fp8]", "[checkpoint]", "[nvfp4]", "[dora]")])
def test_a_run_on_an_opened_file_equals_stock(folder: Folder, offloaded, name: str) -> None:
    before = counts()
    model = prepared(folder, name)
    assert same(model, *run(model, JOB, Parallel(2)))
    after = counts()
    assert after["opened"] == before.get("opened", 0) + 1 and after.get("models") == before.get("models")
    assert same(model, *run(model, JOB, Parallel(2)))
    assert counts()["opened"] == after["opened"], "what is open stays so"


@pytest.mark.parametrize("name", [LORA, *slowly("[fp8]", "[nvfp4]", "[dora]")])
def test_an_opened_file_has_the_bits_that_rank_0_computes_with(folder: Folder, name: str) -> None:
    import comfy.model_management

    from para_core.comfy import files

    with torch.inference_mode():
        model = prepared(folder, name)
        comfy.model_management.load_models_gpu([model])
        own = files.open_file(files.origin(model), torch.device("cpu"))
        files.load(own, files.patches(model), {"force_cast": False, "working": 0})
        assert own.model is not model.model and state(own) == state(model)


def test_the_way_may_change_from_run_to_run(folder: Folder, monkeypatch) -> None:
    from para_core.comfy import files

    base = prepared(folder, PLAIN)
    for opened, model in ((False, base), (True, base), (True, prepared_on(folder, base, LORA)), (False, prepared_on(folder, base, LORA))):
        monkeypatch.setattr(files, "offloaded", lambda patcher, working, opened=opened: opened)
        assert same(model, *run(model, JOB, Parallel(2)))
    monkeypatch.setattr(files, "offloaded", lambda patcher, working: False)
    assert same(base, *run(base, JOB, Parallel(2)))


def test_cards_that_are_too_small_open_the_file_though_rank_0_holds_the_model(folder: Folder) -> None:
    model = prepared(folder, PLAIN)
    model.size = 2**60
    before = counts().get("opened", 0)
    assert same(model, *run(model, JOB, Parallel(2)))
    assert counts()["opened"] == before + 1


STAYS = [("[simple]", "holds another model's weights"), ("[function]", "comes with a function of its own")]


@pytest.mark.parametrize("word, sentence", STAYS)
def test_patches_that_cannot_travel_to_an_opened_file_keep_the_run_on_one_rank(folder, offloaded, word: str, sentence: str) -> None:
    model = prepared(folder, named(word))
    result, report = run(model, JOB, Parallel(2))
    (note,) = report["notes"]
    assert report["ranks"] == 1 and "does not fit the GPUs whole" in note and sentence in note
    assert torch.equal(result, sample(model, JOB))


def test_a_loader_without_a_record_has_its_weights_sent(folder, offloaded) -> None:
    before = counts().get("models", 0)
    model = prepared(folder, LORA)
    model.cached_patcher_init = None
    assert same(model, *run(model, JOB, Parallel(2)))
    assert counts()["models"] == before + 1


@pytest.mark.parametrize("opened", [False, True])
def test_weights_that_move_are_not_part_of_a_graph_though_rank_0_captures_its_own(opened: bool) -> None:
    """A card that cannot hold the model beside one that can: what a graph copied from host memory would be stale."""
    from para_core.comfy.worker import Run

    asked: dict[str, Any] = {}
    run = object.__new__(Run)
    run.opened, run.names, run.function = opened, [], None
    run.patches = SimpleNamespace(follow=lambda _options, _patches: {})
    run.runner = SimpleNamespace(
        override=SimpleNamespace(ways=SimpleNamespace(learn=lambda _table: None)), run=lambda *_args, **options: asked.update(options)
    )
    share = {"kernels": {}, "ways": {}, "part": ((), {}), "cache": None, "patches": [], "graph": True, "whole": False}
    run.forward(share, None, None)
    assert asked["graph"] is not opened


@pytest.mark.parametrize(("rate", "ranks"), [(1e-6, 2), (1e7, 1)], ids=["long steps", "short steps"])
def test_a_careful_run_is_split_with_a_card_that_fetches_weights_if_its_steps_take_longer_than_that(
    folder: Folder, monkeypatch, rate: float, ranks: int
) -> None:
    from para_core.comfy import split
    from para_core.execution import gain

    monkeypatch.setattr(split, "processors_of_their_own", lambda _device: True)
    monkeypatch.setattr(gain, "matrix_rate", lambda _device, _dtype: rate)
    monkeypatch.setattr(gain, "memory_rate", lambda _device: 1e9)
    model = prepared(folder, PLAIN)
    model.size = 2**60
    result, report = run(model, JOB, Parallel(2, careful=True))
    assert report["ranks"] == ranks and any("no room for the whole model" in note for note in report["notes"]) is (ranks == 1)
    assert error(result, sample(model, JOB)) < 1e-5 * JOB.steps


def test_a_card_needs_room_to_compute_beside_the_weights(monkeypatch) -> None:
    """Where there is none the model would arrive, and every prompt's first step would run out of memory."""
    from para_core.comfy import sidecars

    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(sidecars, "group", lambda: SimpleNamespace(fits=lambda *numbers: asked.append(numbers) or len(asked) < 3))
    monkeypatch.setattr(sidecars, "model_id", lambda _patcher: 1)
    model: Any = SimpleNamespace(model_size=lambda: 8)
    assert [sidecars.fit(model, working) for working in (0, 4.5, math.inf)] == [True, True, False]
    assert asked == [(1, 8, 0), (1, 8, 4), (1, 8, sys.maxsize)]
