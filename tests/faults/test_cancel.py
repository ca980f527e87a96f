"""Cancel ends the prompt within the running forward, and nothing else."""

from __future__ import annotations

import random
import time

import pytest
from faults.sampling import STEPS, Prompt, at_step, check_full, prepared, run, sample

CASES = [Prompt("flux", 2), Prompt("wan", 2), Prompt("flux", 2, cfg=5.0, tokens=(11, 7)), Prompt("wan", 2, threshold=0.12)]


@pytest.mark.parametrize("seed", [*range(10), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(10, 80))])
def test_cancel_at_a_random_moment_ends_the_prompt_and_the_next_one_has_the_same_workers(group, seed: int, record_property) -> None:
    from comfy.model_management import InterruptProcessingException, interrupt_current_processing

    dice = random.Random(seed)
    prompt = CASES[seed % len(CASES)]
    if not group.counts["steps"] or group.size != prompt.ranks:
        check_full(prompt)
    pids, before, steps = group.pids, dict(group.counts), group.counts["steps"]
    at: list[float] = []

    def cancel() -> None:
        at.append(time.monotonic())
        interrupt_current_processing(True)

    undo = at_step(group, dice.randrange(STEPS - 1), dice.uniform(0.0, 0.06), cancel)
    model = prepared(prompt)
    with pytest.raises(InterruptProcessingException):
        sample(model, prompt)
    seconds = time.monotonic() - at[0]
    undo()
    record_property("seconds to the end of the prompt", round(seconds, 3))
    assert seconds < 3
    assert group.counts["steps"] - steps < 2 * STEPS
    check_full(prompt)
    assert group.pids == pids
    assert all(group.counts[name] == before[name] for name in ("starts", "joins"))


def test_cancel_of_a_prompt_that_loses_a_worker_is_not_answered_with_a_whole_step(group) -> None:
    import os
    import signal

    from comfy.model_management import InterruptProcessingException, interrupt_current_processing

    check_full(Prompt())

    def both() -> None:
        interrupt_current_processing(True)
        os.kill(group.pids[0], signal.SIGKILL)

    undo = at_step(group, 1, 0.0, both)
    with pytest.raises(InterruptProcessingException):
        run(Prompt())
    undo()
    check_full(Prompt())
