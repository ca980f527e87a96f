"""Conditions are on the device before the first step, so that no step copies them there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity.inprocess import Job, error, load, reports, sample


def test_every_kind_of_tensor_goes_to_the_device_and_the_rest_stays(comfy: None) -> None:
    import comfy.conds as conds

    from para_core.comfy import resident

    kinds = conds.CONDRegular, conds.CONDNoiseShape, conds.CONDCrossAttn
    told: dict[str, Any] = {kind.__name__: kind(torch.ones(1, 2)) for kind in kinds}
    told |= {
        "list": conds.CONDList([torch.ones(3), torch.ones(4)]),
        "constant": conds.CONDConstant(torch.ones(5)),
        "word": conds.CONDConstant("a"),
    }
    before = dict(told)
    resident.keep({"positive": [{"model_conds": told, "pooled_output": torch.ones(1)}, {}], "negative": []}, torch.device("meta"))
    for kind in kinds:
        assert type(told[kind.__name__]) is kind and told[kind.__name__].cond.is_meta and not before[kind.__name__].cond.is_meta
    assert [each.is_meta for each in told["list"].cond] == [True, True] and told["list"].cond[1].shape == (4,)
    assert told["constant"] is before["constant"] and told["word"].cond == "a"


def test_a_run_moves_its_own_conditions_before_the_first_step(comfy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from para_core.comfy import resident
    from para_core.comfy.attach import attach
    from para_core.settings import Attention

    seen: list[Any] = []
    monkeypatch.setattr(resident, "keep", lambda conditions, device: seen.append((conditions, device)))
    model = load("flux_small")
    job = Job("flux_small", cfg=2.0)
    stock = sample(model, job)
    assert not seen, "runs without this pack's nodes are left alone"
    with reports() as lines:
        assert error(sample(attach(model, Attention("exact")), job), stock) < 1e-5 and lines
    ((conditions, device),) = seen
    assert device == model.load_device and set(conditions) == {"positive", "negative"}
    assert all("c_crossattn" in condition["model_conds"] for own in conditions.values() for condition in own)
    sample(model, job)
    assert len(seen) == 1, "the wrapper went with its run"
