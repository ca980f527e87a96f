"""Attention Backend without any other node: the run still checks kernels that quantise, and survives one that breaks."""

from __future__ import annotations

import functools

import pytest
import torch
from parity import inprocess

from para_core.attention import choice
from para_core.attention.backends import Backend, pytorch

JOB = inprocess.Job("flux", steps=3)


@pytest.fixture
def quantising(comfy, monkeypatch):
    """Puts a kernel that claims to quantise before the stock one; returns what it has done and how it is broken."""
    from para_core.comfy import session

    state = {"calls": 0, "broken from": None}

    def run(q, k, v, *, mask, scale):
        state["calls"] += 1
        out = pytorch.run(q, k, v, mask=mask, scale=scale)
        return out * torch.nan if state["broken from"] is not None and state["calls"] >= state["broken from"] else out

    fake = Backend("sage", False, "", lambda: None, lambda request: None, run)
    made = []

    def chooser(*args, **options):
        made.append(choice.Chooser(*args, **options, table=(fake, pytorch.BACKEND), order=lambda request: ("sage",)))
        return made[-1]

    monkeypatch.setattr(session, "Chooser", functools.wraps(choice.Chooser)(chooser))
    return state, made


def test_every_layer_is_compared_in_the_first_forward_and_in_no_later_one(quantising):
    from para_core.settings import Attention

    state, made = quantising
    latent, _ = inprocess.run(inprocess.load("flux"), JOB, Attention("auto"))
    assert made[0].check.compared == state["calls"] / JOB.steps > 1
    assert inprocess.error(latent, inprocess.sample(inprocess.load("flux"), JOB)) < 1e-6


def test_a_kernel_that_breaks_later_costs_a_forward_and_not_the_picture(quantising):
    from para_core.settings import Attention

    state, made = quantising
    inprocess.run(inprocess.load("flux"), JOB, Attention("auto"))
    state["broken from"] = 2 * state["calls"] // JOB.steps + state["calls"]
    latent, report = inprocess.run(inprocess.load("flux"), JOB, Attention("auto"))
    assert inprocess.error(latent, inprocess.sample(inprocess.load("flux"), JOB)) < 1e-6
    assert any("NaN" in note for note in report["notes"]) and "sage" in made[1].replaced
