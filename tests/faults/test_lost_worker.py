"""A sidecar that is killed or stops in the middle of a step costs time, not the image."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
from faults.sampling import STEPS, TOLERANCE, Prompt, at_step, check_full, reference, run

NEVER = 1e-9  # a cache threshold that no step stays under


def case(seed: int) -> tuple[Prompt, int, float, int]:
    """A prompt, and when and whom to hit: the step, seconds into it, the worker."""
    dice = random.Random(seed)
    ranks = 3 if seed % 10 > 6 else 2
    cfg, tokens = dice.choice([(1.0, (11, 11)), (5.0, (11, 11)), (5.0, (11, 7))])
    prompt = Prompt(("flux", "wan")[seed % 2], ranks, (0.0, NEVER, 0.0, 0.12)[seed % 4], cfg, tokens)
    return prompt, dice.randrange(STEPS - 1), dice.uniform(0.0, 0.06), dice.randrange(ranks - 1)


def lose(group, seed: int, kind: signal.Signals, words: str) -> float:
    """Hit a worker in the middle of a prompt; seconds from there to the prompt's end."""
    prompt, step, delay, victim = case(seed)
    at: list[float] = []
    bystanders: set[int] = set()

    def hit() -> None:
        at.append(time.monotonic())
        bystanders.update(pid for index, pid in enumerate(group.pids) if index != victim)
        os.kill(group.pids[victim], kind)

    undo = at_step(group, step, delay, hit)
    outcome = run(prompt)
    seconds = time.monotonic() - at[0]
    undo()

    (note,) = outcome.report["notes"]
    assert f"rank {victim + 1} on cpu" in note and words in note and "next prompt" in note, note
    assert "\n" not in note and len(note) < 500
    assert sum("The last it printed" in line for line in outcome.log) == 1
    assert outcome.latent.isfinite().all()
    if prompt.threshold in (0.0, NEVER):
        assert outcome.error(reference(prompt)) < TOLERANCE
    else:
        assert outcome.error(reference(prompt)) < 0.3
        # what other ranks held of the cache is lost with them: conditions that were cached start cold a second time
        changes = [change for _sigma, changes, _hit in outcome.report["changes"] for change in changes]
        cold, conditions = changes.count(None), len(changes) // STEPS
        assert conditions + (step >= 2) <= cold <= 2 * conditions  # by then each has been computed

    check_full(prompt)
    assert bystanders < set(group.pids)
    return seconds


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 60))])
def test_a_worker_killed_at_a_random_moment_costs_no_image_and_is_replaced(group, seed: int, record_property) -> None:
    seconds = lose(group, seed, signal.SIGKILL, "was ended by SIGKILL")
    record_property("seconds to the end of the prompt", round(seconds, 2))
    assert seconds < 20


@pytest.mark.parametrize("seed", [100, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(101, 110))])
def test_a_worker_stopped_at_a_random_moment_counts_as_hung_and_is_replaced(group, seed: int, record_property) -> None:
    group.timeouts.heartbeat = 2.0
    seconds = lose(group, seed, signal.SIGSTOP, "gave no sign of life for 2 s")
    record_property("seconds to the end of the prompt", round(seconds, 2))
    assert seconds < 20


@pytest.mark.slow
def test_a_worker_killed_between_prompts_is_replaced_without_a_word(group) -> None:
    check_full(Prompt())
    group.members[0].process.kill()  # and see it gone
    check_full(Prompt())


def test_the_group_grows_and_shrinks_and_keeps_the_workers_it_can(group) -> None:
    check_full(Prompt(ranks=2))
    (first,) = group.pids
    check_full(Prompt(ranks=3))
    assert group.pids[0] == first and len(group.pids) == 2
    check_full(Prompt("wan", ranks=2))
    assert group.pids == [first]
