"""A run's report equals what the run measured: whole runs in the test process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from parity import inprocess
from parity.inprocess import Job, load

from para_core.settings import Attention, Cache, Parallel

pytestmark = pytest.mark.usefixtures("comfy")

GRAPH = {
    "7": {"class_type": "KSampler", "inputs": {"seed": 1}, "_meta": {"title": "Sample"}},
    "9": {"class_type": "ParaReport", "inputs": {"samples": ["7", 0]}},
}
SENT: list[tuple[str, str]] = []


@pytest.fixture(autouse=True)
def prompt(comfy, monkeypatch) -> Iterator[None]:
    """A prompt is executing, and a server takes the progress texts."""
    import sys

    from comfy_execution.graph import DynamicPrompt
    from comfy_execution.progress import reset_progress_state

    from para_core.comfy import reports

    server = SimpleNamespace(send_progress_text=lambda text, node: SENT.append((node, text)))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    reset_progress_state("prompt", DynamicPrompt(GRAPH))
    SENT.clear()
    reports._finished.clear()
    yield
    reports._finished.clear()
    reset_progress_state("", DynamicPrompt({}))


@contextmanager
def at(node: str) -> Iterator[None]:
    from comfy_execution.utils import CurrentNodeContext

    with CurrentNodeContext("prompt", node, None):
        yield


def run(job: Job, *settings: Any, **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    with at("7"):
        return inprocess.run(load(job.kind), job, *settings, **options)


def found(latents: torch.Tensor) -> tuple[dict[str, Any], str]:
    """The report that the node finds, and its text."""
    from comfy_execution.progress import get_progress_state

    from para_core.comfy import reports, wording

    with at("9"):
        (one,), _ = reports.find(get_progress_state().dynprompt, "9", latents)
    return one.report, wording.text(one.report, one.maker)


def check_sums(report: dict[str, Any]) -> None:
    timeline = report["timeline"]
    assert sum(step["forwards"] for step in timeline) == report["forwards"]
    assert sum(step["hits"] for step in timeline) == report["cached"]
    seconds = sum(step["seconds"] for step in timeline)
    assert abs(seconds / report["steps"] - report["seconds_per_step"]) < 1e-4
    assert 0 < seconds <= report["wall"] + 1e-3
    assert all(step["seconds"] > 0 for step in timeline)


def test_the_report_is_what_the_log_line_says(comfy):
    latents, line = run(Job(steps=6), Cache(0.5))
    report, text = found(latents)
    assert json.loads(json.dumps(report)) == line
    check_sums(line)
    assert line["cached"] > 0 and line["cache"]["threshold"] == 0.5
    timeline = line["timeline"]
    assert [step["change"] for step in timeline] == [changes[0] for _, changes, _ in line["changes"]]
    assert [step["hits"] for step in timeline] == [int(hit) for *_, hit in line["changes"]]
    assert [step["sigma"] for step in timeline] == [sigma for sigma, *_ in line["changes"]]
    assert text.startswith("Sample (node 7): Flux\nTime: ")
    for part in (
        f"{line['seconds_per_step']:.3g} s a step, 6 steps",
        f"Cache: {line['cached']} of 6 steps cached, threshold 0.5, reuse",
        "Ranks: 1",
        "Attention: ComfyUI's own",
        "Fallbacks: none",
    ):
        assert part in text


def test_a_cached_step_is_seen_to_be_faster(comfy):
    _, line = run(Job(size=(32, 32), steps=8), Cache(0.9))
    hits = [step["seconds"] for step in line["timeline"] if step["hits"]]
    computed = [step["seconds"] for step in line["timeline"] if not step["hits"]]
    assert hits and min(hits) < min(computed)


@pytest.mark.parametrize("ranks", [2])
@pytest.mark.parametrize("parallel, words", [(Parallel(2), "1 x 1 x 2"), (Parallel(2, ring_degree=2), "1 x 2 x 1")])
def test_ranks_degrees_and_exchange_are_reported(comfy, monkeypatch, ranks, parallel, words):
    from para_core.comfy.session import Session

    sessions = []
    finish = Session.finish
    monkeypatch.setattr(Session, "finish", lambda self, result: (sessions.append(self), finish(self, result)) and None)
    latents, line = run(Job(steps=3), parallel)
    report, text = found(latents)
    assert report == line and line["ranks"] == ranks
    check_sums(line)
    assert f"Ranks: 2 (batch x ring x ulysses = {words}); exchange and waiting" in text and "MB sent a forward" in text
    assert "s until the other ranks were there, " in text and line["opening"].keys() == {"workers", "model"}
    exchange = line["exchange"]
    assert 0 < exchange["share"] < 1 and exchange["of_seconds"] > exchange["seconds"] > 0
    assert abs(exchange["of_seconds"] - sum(step["seconds"] for step in line["timeline"])) < 1e-4
    counted = sessions[0].runner.override.traffic.bytes / line["forwards"]
    assert counted < exchange["bytes"] < 2 * counted + 1e6, "attention's share, and what else a forward sends"
    from para_core.comfy import sidecars

    assert sidecars.group()._comm._life.exchanged is None, "nobody counts after the run"


@pytest.mark.parametrize("ranks", [2])
def test_what_travels_as_bytes_and_in_parts_is_told_to_sidecars_and_reported(comfy, monkeypatch, ranks):
    from para_core.attention.exchange import Way
    from para_core.comfy.split import Split
    from para_core.execution.ways import Machine, Ways
    from para_core.sequence.mesh import Link

    plain, before = run(Job(steps=3), Parallel(2))
    assert before["exchange"]["wire"] is None and before["exchange"]["parts"] == 1
    monkeypatch.setattr(Split, "_machine", lambda self: Machine(Link(1e-4, 1e6), 1e12))
    monkeypatch.setattr(Ways, "_choose", lambda self, name, met, machine: Way(parts=3))
    latents, line = run(Job(steps=3), Parallel(2))
    assert line["exchange"]["parts"] == 3 and torch.equal(latents, plain), "parts change no bit"
    monkeypatch.setattr(Ways, "_choose", lambda self, name, met, machine: Way(wire=True, parts=2))
    latents, line = run(Job(steps=3), Parallel(2))
    _, text = found(latents)
    assert line["ranks"] == ranks and line["notes"] == before["notes"]
    assert line["exchange"]["wire"] == "int8" and line["exchange"]["parts"] == 2
    assert "MB sent a forward by the first rank, q, k and v as int8, heads in up to 2 parts" in text
    assert line["exchange"]["bytes"] < 0.8 * before["exchange"]["bytes"], "two of three forwards sent less"
    assert 0 < (latents - plain).norm() < 0.02 * plain.norm()


@pytest.mark.parametrize("ranks", [2])
def test_conditions_at_one_noise_level_are_one_step(comfy, ranks):
    job = Job(cfg=5.0, tokens=(11, 7), steps=3)
    _, one = run(job, Cache(1e-9))
    _, two = run(job, Cache(1e-9), Parallel(ranks, batch_degree=2))
    for line in (one, two):
        check_sums(line)
        assert [step["forwards"] for step in line["timeline"]] == [2, 2, 2]
    assert [step["decisions"] for step in one["timeline"]] == [2, 2, 2], "each condition for itself"
    assert [step["decisions"] for step in two["timeline"]] == [1, 1, 1], "one decision for both"


def test_both_evaluations_of_a_step_at_one_noise_level_are_one_entry(comfy):
    _, line = run(Job(sampler="heun", steps=3), Cache(1e-9))
    check_sums(line)
    assert line["forwards"] == 5 and [step["forwards"] for step in line["timeline"]] == [1, 2, 2]


def test_kernels_are_listed_by_kind_of_call_and_what_was_fallen_back_from_with_its_reason(comfy):
    latents, line = run(Job(steps=2, size=(8, 8)), Attention("sage"), Cache(1e-9))
    _, text = found(latents)
    name, kind, calls = line["kernels"][0]
    assert name == "pytorch" and "27 tokens" in kind and calls == sum(count for *_, count in line["kernels"]) > 0
    assert f"pytorch: {calls} calls of {kind}" in text
    assert "pytorch instead of sage" in text
    assert line["notes"] and f"Fallbacks and notes:\n- {line['notes'][0]}" in text


def test_a_run_that_could_not_be_accelerated_is_reported_with_its_reason(comfy):
    model = load("flux").clone()
    model.injections = {"code of another node": []}
    with at("7"):
        latents = inprocess.sample(inprocess.attached(model, Parallel(2)), Job(steps=2))
    report, text = found(latents)
    check_sums(report)
    assert report["ranks"] == 1 and len(report["timeline"]) == 2, "it is timed all the same"
    assert "- This run stays on one GPU, because a node injects code into the model (code of another node)" in text


def test_an_interrupted_run_made_no_latents_and_has_no_report(comfy):
    from para_core.comfy import reports

    class Stop(Exception):
        pass

    def callback(step, *_) -> None:
        if step == 1:
            raise Stop

    with pytest.raises(Stop):
        run(Job(steps=3), Cache(1e-9), callback=callback)
    assert not reports._finished


def test_the_sampler_shows_how_far_it_is_and_the_samplers_own_callback_is_called(comfy, monkeypatch):
    from para_core.comfy import notify

    monkeypatch.setattr(notify, "PAUSE", 0.0)
    steps = []
    _, line = run(Job(steps=4), Cache(0.9), callback=lambda step, *_: steps.append(step))
    assert steps == [0, 1, 2, 3]
    nodes, texts = zip(*SENT, strict=True)
    assert set(nodes) == {"7"}
    assert [text.split(",")[0] for text in texts[:4]] == [f"step {number}/4" for number in (1, 2, 3, 4)]
    assert "s/step" in texts[0] and texts[3].endswith(f"{line['cached']} cached")
    assert texts[4].startswith("1 rank, ")


def test_progress_is_shown_at_most_twice_a_second_and_below_it_what_was_said(comfy):
    from para_core.comfy.notify import Notes

    now = [0.0]
    asked = []
    notes = Notes(clock=lambda: now[0])
    with at("7"):
        for hundredth in range(200):
            now[0] = hundredth / 100
            if hundredth == 120:
                notes.say("One sentence.")
            notes.live(lambda: asked.append(now[0]) or f"at {now[0]}")
    assert asked == [0.0, 0.5, 1.0, 1.5], "what is not shown is not put into words"
    assert [text for _, text in SENT] == ["at 0.0", "at 0.5", "at 1.0", "One sentence.", "at 1.5\nOne sentence."]


def test_what_several_ranks_say_is_said_once_and_what_one_says_with_its_device(comfy):
    from para_core.comfy.notify import Notes

    notes = Notes()
    notes.say("All.")
    notes.relay([("cuda:1", "All."), ("cuda:2", "Some."), ("cuda:3", "Some."), ("cuda:3", "One.")])
    notes.relay([("cuda:2", "All.")])
    assert notes.said == ["All.", "On cuda:2, cuda:3: Some.", "On cuda:3: One."]


def test_the_text_of_a_node_inside_an_expanded_one_stands_on_the_outer_one(comfy):
    from comfy_execution.progress import get_progress_state

    from para_core.comfy.notify import show

    get_progress_state().dynprompt.add_ephemeral_node("7.0.0.1", GRAPH["7"], "7", "7")
    with at("7.0.0.1"):
        show("words")
    assert SENT == [("7", "words")]
