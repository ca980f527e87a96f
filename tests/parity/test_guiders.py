"""Guiders of core and of other packs: what they keep and ask for must not matter to a split."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from parity import inprocess
from parity.inprocess import Job, error, load, noise

from para_core.settings import Attention, Cache, Parallel

pytestmark = pytest.mark.usefixtures("comfy")
TOLERANCE = 1e-5  # relative, per forward, float32
JOB = Job("flux_small", cfg=3.0, tokens=(11, 7))
SIGMAS = torch.tensor([1.0, 0.6, 0.0])


def latent(guider: Any) -> torch.Tensor:
    import comfy.samplers

    start = noise(1, 16, *JOB.size)
    with torch.inference_mode():
        return guider.sample(start, torch.zeros_like(start), comfy.samplers.sampler_object("euler"), SIGMAS, disable_pbar=True, seed=1)


def split_like_stock(guider: Any, *settings: Any) -> dict[str, Any]:
    """The run line of ``guider(model)`` over two ranks, whose result must be that of stock."""
    expected = latent(guider(load(JOB.kind)))
    with inprocess.reports() as lines:
        result = latent(guider(inprocess.attached(load(JOB.kind), Parallel(2, batch_degree=2), *settings)))
    (report,) = lines
    assert report["ranks"] == 2 and not any("one GPU" in note for note in report["notes"])
    assert error(result, expected) < TOLERANCE * report["forwards"]
    return report


@pytest.mark.parametrize("ranks, cfg", [(2, [3.0, 1.0]), (2, None)])
def test_a_guider_that_keeps_a_schedule_in_place_of_one_cfg_is_split_like_others(ranks: int, cfg: Any) -> None:
    """As guiders of other packs do, who read it in ``predict_noise``."""
    import comfy.samplers

    class Scheduled(comfy.samplers.CFGGuider):
        def predict_noise(self, x: torch.Tensor, timestep: torch.Tensor, model_options: Any = None, seed: Any = None) -> torch.Tensor:
            conds = self.conds["negative"], self.conds["positive"]
            return comfy.samplers.sampling_function(self.inner_model, x, timestep, *conds, 3.0, model_options=model_options, seed=seed)

    def guider(model: Any) -> Any:
        made = Scheduled(model)
        made.set_conds(JOB.conditioning(11, 11), JOB.conditioning(12, 7))
        made.set_cfg(cfg)
        return made

    split_like_stock(guider)


LATE = {"start_percent": 0.9, "end_percent": 1.0}
LEFT = {"area": (8, 6, 0, 0), "strength": 1.0}


@pytest.mark.parametrize("other, forwards", [(LATE, 6), (LEFT, 12)], ids=["alone", "beside an area"])
@pytest.mark.parametrize("ranks", [2])
def test_a_prompt_that_holds_where_no_other_does_is_computed_in_a_lane(ranks: int, other: dict[str, Any], forwards: int) -> None:
    """Core's node Cond Set Default Combine, in a guider of three prompts; ComfyUI copies an area of one to the others."""
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    def guider(model: Any) -> Any:
        made = Guider_DualCFG(model)
        first = [*JOB.conditioning(14, 9, **other), *JOB.conditioning(11, 11, default=True)]
        made.set_conds(first, JOB.conditioning(12, 7), JOB.conditioning(13, 5))
        made.set_cfg(3.0, 2.0)
        return made

    report = split_like_stock(guider)
    assert report["forwards"] == forwards and report["degrees"] == [2, 1, 1]


@pytest.mark.parametrize("cfg, expected", [(1.0, False), (3.0, True), ([3.0, 1.0], True), (None, True)])
def test_a_guider_is_taken_to_have_a_negative_prompt_unless_its_cfg_is_1(cfg: Any, expected: bool) -> None:
    from para_core.comfy.session import guided

    assert guided(SimpleNamespace(cfg=cfg)) is expected and not guided(SimpleNamespace())  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks", [2])
def test_three_prompts_of_a_guider_run_in_lanes(ranks: int) -> None:
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    def guider(model: Any) -> Any:
        made = Guider_DualCFG(model)
        made.set_conds(JOB.conditioning(11, 11), JOB.conditioning(12, 7), JOB.conditioning(13, 5))
        made.set_cfg(3.0, 2.0)
        return made

    assert split_like_stock(guider, Cache(1e-9))["degrees"] == [2, 1, 1]


@pytest.mark.parametrize("settings", [(Cache(1e9),), (Cache(1e9, rule="forecast"),), (Attention("pytorch"), Parallel(2))])
@pytest.mark.parametrize("ranks", [2])
def test_a_run_that_trains_is_left_alone(
    settings: tuple, ranks: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ComfyUI's training node samples with the model that it is given, in its own way."""
    import comfy.model_management

    job = JOB.but(steps=6)
    monkeypatch.setattr(comfy.model_management, "in_training", True)
    expected = inprocess.sample(load("flux_small"), job)
    with inprocess.reports() as lines:
        assert torch.equal(inprocess.sample(inprocess.attached(load("flux_small"), *settings), job), expected)
    assert not lines and caplog.text.count("this run trains") == 1
