"""What ComfyUI is asked to make room for: a card's part of shared steps, and whole steps before any is computed alone."""

from __future__ import annotations

import os
import signal

import pytest
from faults.sampling import SIZES, STEPS, Prompt, at_step, check_full, load, log_lines, prepared, run, sample

THIRD = 0.2 + 1.25 * 2 / 5  # Ulysses on three ranks: one of three heads, and two of five rows of patches
HALF = (0.5, 1.0)  # two ranks: half of two rows of the batch; two of three heads of one, which saves nothing
WHOLE = (1.0, 1.0)


@pytest.fixture
def asked(monkeypatch) -> list[tuple[float, float]]:
    """What ComfyUI is asked for whenever a model is loaded: most and least, as parts of what stock asks for at this size."""
    import comfy.model_management
    import comfy.sampler_helpers

    found: list[tuple[float, float]] = []
    load_models_gpu, estimate = comfy.model_management.load_models_gpu, comfy.sampler_helpers.estimate_memory
    stock: dict[str, tuple[float, float]] = {}

    def spy(models, memory_required=0, **kwargs):
        if stock:
            found.append((memory_required / stock["is"][0], kwargs["minimum_memory_required"] / stock["is"][1]))
        return load_models_gpu(models, memory_required=memory_required, **kwargs)

    def estimated(model, shape, conds):
        if "memory_required" not in vars(model.model):
            stock["is"] = estimate(model, shape, conds)
        return estimate(model, shape, conds)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", spy)
    monkeypatch.setattr(comfy.sampler_helpers, "estimate_memory", estimated)
    return found


CASES = {
    "a sequence": (Prompt(ranks=3), (THIRD, THIRD)),
    "a batch": (Prompt(cfg=5.0), HALF),
    "prompts side by side": (Prompt("wan", cfg=5.0, tokens=(11, 7)), HALF),
}


@pytest.mark.parametrize("name", CASES)
def test_a_shared_run_asks_for_the_part_of_a_card(group, asked, name: str) -> None:
    prompt, expected = CASES[name]
    assert run(prompt).report["ranks"] == prompt.ranks
    assert asked == [pytest.approx(expected)]
    assert "memory_required" not in vars(load(prompt.kind).model), "and afterwards ComfyUI's own estimate holds"


def test_a_lost_worker_has_the_whole_step_asked_for_before_it_is_computed_alone(group, asked) -> None:
    from para_core.comfy.session import Session

    prompt, known = Prompt(), []
    alone = Session.alone
    check_full(prompt)
    del asked[:]

    def spy(self, call):
        known.append(list(asked))
        return alone(self, call)

    undo = at_step(group, 1, 0.0, lambda: os.kill(group.pids[0], signal.SIGKILL))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "alone", spy)
        outcome = run(prompt)
    undo()
    assert "computed on one GPU" in outcome.report["notes"][0]
    assert known[0] == [HALF, WHOLE] and known[-1] == known[0]
    assert "memory_required" not in vars(load(prompt.kind).model)
    check_full(prompt)


def test_a_run_that_cannot_be_shared_has_whole_steps_asked_for(group, asked, monkeypatch) -> None:
    from para_core.group.group import GroupError

    def form(*_args) -> None:
        raise GroupError("there is no group today")

    monkeypatch.setattr(group, "form", form)
    assert run(Prompt()).report["notes"] == ["This run stays on one GPU, because there is no group today."]
    assert asked == [HALF, WHOLE]


@pytest.mark.parametrize("known", ["before the model is loaded", "once the link is measured"])
def test_a_run_that_would_lose_by_a_split_has_whole_steps_asked_for(group, asked, known, monkeypatch) -> None:
    from para_core.comfy.attach import attach
    from para_core.comfy.split import Split
    from para_core.settings import Parallel

    loses = Split._loses
    if known == "once the link is measured":
        monkeypatch.setattr(Split, "_loses", lambda self, shape, link=None: loses(self, shape, link) if link else "")
    with log_lines() as lines:
        sample(attach(load("flux"), Parallel(gpus=2, careful=True)), Prompt())
    assert any("CPU processes share one processor" in line for line in lines)
    assert asked == ([HALF, WHOLE] if known == "once the link is measured" else [WHOLE])


def test_steps_that_fewer_ranks_share_than_was_said_have_whole_steps_asked_for(group, asked) -> None:
    outcome = run(Prompt(ranks=3, tokens=(1, 1)))  # fewer text tokens than ranks
    assert outcome.report["degrees"] == [1, 1, 1] and outcome.report["forwards"] == STEPS
    assert asked == [pytest.approx((THIRD, THIRD)), WHOLE], "once"


def test_patches_of_other_nodes_count_as_whole_steps(group, asked) -> None:
    model = prepared(Prompt()).clone()
    model.set_model_patch(lambda args: args, "post_input")
    sample(model, Prompt())
    assert asked == [WHOLE]


def test_conditions_are_batched_by_what_a_card_needs(group, monkeypatch) -> None:
    both = load("flux").model.memory_required([2, 16, *SIZES["flux"]])
    monkeypatch.setattr(type(load("flux")), "get_free_memory", lambda *_: 1.5 * both * 0.75)
    assert run(Prompt(cfg=5.0)).report["forwards"] == STEPS, "one call a step, of which each rank computes half"
    assert run(Prompt(cfg=5.0, ranks=1, threshold=1e-9)).report["forwards"] == 2 * STEPS
