"""A sidecar that raises, runs out of memory, or fails before it has computed anything."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from faults.sampling import TOLERANCE, Outcome, Prompt, at_step, check_full, load, prepared, reference, run, scripts
from parity import inprocess

from para_core.settings import Attention, Parallel

LORA = "diffusion_model.double_blocks.0.img_attn.qkv.weight"


@pytest.fixture(scope="module")
def order(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("faults") / "order.json"


@pytest.fixture(scope="module")
def faulty(comfy, order):
    """A group whose workers fail as the file `order` says; kept for the whole module."""
    from para_core.comfy import sidecars
    from para_core.group.group import Group

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAULT", str(order))
        usual, sidecars._group = sidecars._group, Group(scripts() / "faulty_sidecar.py", sidecars._hello)
        yield sidecars._group
        sidecars._group.close()
        sidecars._group = usual


@pytest.fixture
def group(faulty, order):
    from para_core.group.group import Timeouts

    yield faulty
    faulty.timeouts = Timeouts()
    order.unlink(missing_ok=True)
    vars(faulty).pop("step", None)


def fault(order: Path, at: str, how: str, **more: int) -> None:
    written = order.with_suffix(".new")  # the worker may look at any time
    written.write_text(json.dumps({"rank": 1, "at": at, "how": how, **more}))
    written.rename(order)


def check_alone(outcome: Outcome, prompt: Prompt, *words: str) -> None:
    """The image is right, and one sentence says what happened."""
    assert outcome.error(reference(prompt)) < TOLERANCE
    (note,) = outcome.report["notes"]
    assert all(word in note for word in words), note
    assert "\n" not in note and len(note) < 500


CASES = [
    ("memory", 7, 2, "rank 1 on cpu failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB;"),
    ("error", 3, 2, "rank 1 on cpu failed: ValueError: the kernel did not like these numbers"),
    ("huge", 0, 2, "rank 1 on cpu failed: RuntimeError: "),
    pytest.param("error", 5, 3, "rank 1 on cpu failed: ValueError: the kernel did not like these numbers", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("how", "after", "ranks", "words"), CASES)
def test_an_error_in_a_worker_is_told_and_the_worker_serves_the_next_prompt(
    group, order, how: str, after: int, ranks: int, words: str
) -> None:
    prompt = Prompt(ranks=ranks)
    check_full(prompt)
    pids, models = group.pids, group.counts["models"]
    fault(order, "exchange", how, after=after)
    outcome = run(prompt)
    assert not order.exists()
    check_alone(outcome, prompt, words, "next prompt")
    assert any("The last it printed" in line and "faulty_sidecar.py" in line for line in outcome.log)
    check_full(prompt)
    assert group.pids == pids and group.counts["models"] == models


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_worker_that_beats_but_hangs_is_replaced_and_those_that_wait_for_it_stay(group, order, ranks: int) -> None:
    from para_core.group.group import Timeouts

    prompt = Prompt(ranks=ranks)
    check_full(prompt)
    pids = group.pids
    group.timeouts.stuck, group.timeouts.slowest = 2.0, 2.0
    undo = at_step(group, 1, 0.0, lambda: fault(order, "exchange", "hang"))
    outcome = run(prompt)
    undo()
    assert not order.exists()
    check_alone(outcome, prompt, "rank 1 on cpu did not get on for", "next prompt")
    group.timeouts = Timeouts()
    check_full(prompt)
    assert group.pids[0] != pids[0] and group.pids[1:] == pids[1:]


@pytest.mark.parametrize("how", ["kill", pytest.param("stop", marks=pytest.mark.slow)])
def test_a_worker_lost_while_joining_is_replaced_within_the_same_prompt(group, order, how: str) -> None:
    group.timeouts.heartbeat = 2.0
    check_full(Prompt())
    (before,) = group.pids
    group.give_up("the test wants a new communicator")
    fault(order, "join", how)
    check_full(Prompt())
    assert not order.exists() and group.pids != [before]


WHILE_RECEIVING = [
    ("kill", "was ended by SIGKILL"),
    ("error", "ValueError"),
    pytest.param("stop", "gave no sign of life", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("how", "words"), WHILE_RECEIVING)
def test_a_worker_lost_while_it_receives_weights_leaves_the_run_to_one_rank(group, order, how: str, words: str) -> None:
    import comfy.model_management

    group.timeouts.heartbeat = 2.0
    check_full(Prompt())
    comfy.model_management.unload_all_models()  # so that they are sent again
    fault(order, "receive", how)
    outcome = run(Prompt())
    assert not order.exists() and outcome.report["ranks"] == 1
    check_alone(outcome, Prompt(), "stays on one GPU", "rank 1 on cpu", words)
    check_full(Prompt())


def test_a_worker_lost_while_it_applies_patches_leaves_the_run_to_one_rank(group, order) -> None:
    from faults import sampling

    check_full(Prompt())
    fault(order, "patch", "error")
    model = prepared(Prompt()).clone()
    difference = torch.randn(1152, 384, generator=torch.Generator().manual_seed(3)) * 0.05
    assert model.add_patches({LORA: ("diff", (difference,))}) == [LORA]
    with sampling.log_lines() as lines:
        latent = sampling.sample(model, Prompt())
    assert not order.exists() and any("stays on one GPU, because rank 1 on cpu failed: ValueError" in line for line in lines)
    stock = load("flux").clone()
    stock.add_patches({LORA: ("diff", (difference,))})
    expected = sampling.sample(stock, Prompt())
    assert (latent - expected).norm() / expected.norm() < TOLERANCE
    assert (latent - reference(Prompt())).norm() / expected.norm() > 1e-3
    check_full(Prompt())


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "OutOfMemoryError: CUDA out of memory"),
        (AssertionError("wrong number of dimensions"), "AssertionError: wrong number of dimensions"),  # compiled code's
    ],
)
def test_an_error_on_rank_0_is_a_loss_too_and_leaves_no_worker_waiting(group, error, words) -> None:
    from para_core.execution.runner import Runner

    check_full(Prompt())
    pids = group.pids
    original, seen = Runner.run, []

    def once(self, *args, **kwargs):
        seen.append(1)
        if len(seen) == 2:
            raise error
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "run", once)
        outcome = run(Prompt())
    check_alone(outcome, Prompt(), f"rank 0 failed: {words};")
    check_full(Prompt())
    assert group.pids == pids


def test_what_only_a_worker_has_to_say_is_told_with_its_device_and_what_all_say_once(group_running) -> None:
    """A kernel that is not built for another card, or a capture that fails there, makes the whole group slow."""
    group_running(scripts() / "talking_sidecar.py")
    job = inprocess.Job(steps=4)
    latent, report = inprocess.run(load("flux"), job, Parallel(3), Attention("sage"))
    first, other = sorted(report["notes"])
    assert first.startswith("Attention backend sage is not available here") and other == "On cpu, cpu: Nothing is fast on this card."
    assert report["ranks"] == 3 and inprocess.error(latent, inprocess.sample(load("flux"), job)) < TOLERANCE


def test_options_that_cannot_travel_leave_the_run_to_one_rank_and_the_group_as_it_is(group) -> None:
    from faults import sampling

    check_full(Prompt())
    joins = group.counts["joins"]
    model = prepared(Prompt()).clone()
    model.model_options.setdefault("transformer_options", {})["third_party"] = {"function": lambda x: x}
    with sampling.log_lines() as lines:
        latent = sampling.sample(model, Prompt())
    assert (latent - reference(Prompt())).norm() / latent.norm() < TOLERANCE
    assert sum("third_party" in line and "run:" not in line for line in lines) == 1, lines
    check_full(Prompt())
    assert group.counts["joins"] == joins


def test_a_worker_that_ends_at_once_leaves_the_run_to_one_rank(group_running, tmp_path) -> None:
    script = tmp_path / "worker.py"
    script.write_text("import sys\nprint('loading')\nsys.exit('libcuda.so.1 was not found')\n")
    group_running(script)
    started = time.monotonic()
    outcome = run(Prompt())
    assert time.monotonic() - started < 10
    check_alone(outcome, Prompt(), "stays on one GPU", "rank 1 on cpu did not start", "libcuda.so.1 was not found")


def test_a_worker_that_never_answers_leaves_the_run_to_one_rank_after_the_start_timeout(group_running, tmp_path) -> None:
    script = tmp_path / "worker.py"
    script.write_text("import time\ntime.sleep(600)\n")
    group = group_running(script)
    group.timeouts.start = 1.0
    started = time.monotonic()
    outcome = run(Prompt())
    assert time.monotonic() - started < 10
    check_alone(outcome, Prompt(), "stays on one GPU", "rank 1 on cpu did not start")


def test_a_worker_that_starts_at_the_second_try_is_used_in_the_same_prompt(group_running, tmp_path) -> None:
    import para_core

    root = Path(para_core.__file__).parents[1]
    script = tmp_path / "worker.py"
    script.write_text(
        f"import pathlib, runpy, sys\nsys.path.append({str(root)!r})\nmark = pathlib.Path({str(tmp_path / 'mark')!r})\n"
        "if not mark.exists():\n    mark.touch()\n    sys.exit(3)\n"
        "from para_core.sidecar import main\nmain(sys.argv[1])\n"
    )
    group = group_running(script)
    check_full(Prompt())
    assert group.counts["starts"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("at", ["there", "back"])
@pytest.mark.parametrize("how", ["error", "kill", "hang"])
def test_a_worker_that_fails_while_messages_travel_beside_its_mlp_costs_time_not_the_image(group, order, how: str, at: str) -> None:
    prompt = Prompt(compiled=True)
    check_full(prompt)
    group.timeouts.stuck, group.timeouts.slowest = 2.0, 2.0
    undo = at_step(group, 1, 0.0, lambda: fault(order, at, how, after=1))
    outcome = run(prompt)
    undo()
    assert not order.exists()
    check_alone(outcome, prompt, "rank 1 on cpu", "next prompt")
    group.timeouts = type(group.timeouts)()
    check_full(prompt)


@pytest.mark.slow
@pytest.mark.parametrize("at", ["there", "back"])
def test_the_first_rank_failing_while_messages_travel_beside_its_mlp_leaves_nothing_behind(group, monkeypatch, at: str) -> None:
    from para_core.execution.parallel_mlp import Mlp

    prompt = Prompt(compiled=True)
    check_full(prompt)
    original, seen = getattr(Mlp, at), []

    def fails(mlp: Mlp) -> None:
        seen.append(at)
        if len(seen) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        original(mlp)

    with monkeypatch.context() as patch:
        patch.setattr(Mlp, at, fails)
        check_alone(run(prompt), prompt, "rank 0 failed: OutOfMemoryError")
    assert len(seen) > 4, "the rest of the run, alone, computed its blocks too"
    check_full(prompt)
