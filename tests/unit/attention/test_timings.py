"""The choice of a kernel by measurement: what is timed, what is remembered, and who is preferred."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

from para_core.attention import timings
from para_core.attention.backends import Backend, Request
from para_core.attention.choice import Chooser, preferred
from para_core.attention.timings import MARGIN, WORK, Timings, fewer_heads, kind

CPU = torch.device("cpu")
CALL = Request(torch.bfloat16, "cuda", (9, 0), 24, 24, 40, 70, 128)


class Clock:
    """A device's clock that only kernels move. ``calls``: who was called, in order."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def laps(self, calls, device=None):
        marks = [self.now]
        for call in calls:
            call()
            marks.append(self.now)
        return [stop - start for start, stop in itertools.pairwise(marks)]


def backend(name, *, exact=True, missing=None, refusal=None, lse=True, error=None, clock=None, speed=None):
    """``speed``: milliseconds of a call, by the number of this kernel's calls before it and the clock's time."""
    calls = itertools.count()

    def run(q, k, v, *, mask, scale):
        number = next(calls)
        if error is not None and number >= getattr(error, "after", 0):
            raise error
        if clock is not None:
            clock.calls.append(name)
            clock.now += speed(number, clock.now) if callable(speed) else speed
        return q

    return Backend(name, exact, "", lambda: missing, lambda request: refusal, run, run if lse else None)


def table(*names, path=None, **speeds):
    """Timings of kernels by name or as they are, those in ``speeds`` by a clock; the clock."""
    clock = Clock()
    backends = [backend(one, clock=clock, speed=speeds[one]) if isinstance(one, str) else one for one in names]
    made = Timings(path, backends, clock.laps)
    made._environment = "a GPU"
    return made, clock


def order(*names, **speeds):
    """Who is preferred for a call once it has been timed, and what each took."""
    made, _ = table(*names, **speeds)
    made.ranked(CALL)
    made.measure(CPU)
    return made.ranked(CALL), made.table[kind(CALL)]


def test_a_kind_of_call_is_noted_first_and_timed_once_by_every_kernel_that_takes_it():
    made, clock = table("a", "b", backend("no", missing="not installed"), backend("not this", refusal="it takes no mask"), a=2.0, b=1.0)
    assert made.ranked(CALL) is None and made.ranked(CALL) is None and list(made.pending) == [kind(CALL)]
    assert made.measure(CPU) == [kind(CALL)] and set(clock.calls) == {"a", "b"} and not made.pending
    timed = len(clock.calls)
    assert made.ranked(CALL) == ("b", "a") and made.measure(CPU) == [] and len(clock.calls) == timed


def test_calls_on_the_cpu_are_never_timed():
    made, _ = table("a", a=1.0)
    assert made.ranked(replace(CALL, device_type="cpu")) is None and not made.pending


def test_near_lengths_are_one_kind_and_others_are_not():
    near, far = replace(CALL, q_len=41, kv_len=72), replace(CALL, q_len=80)
    assert kind(near) == kind(CALL) != kind(far)
    for other in (dict(mask="bool"), dict(needs_lse=True), dict(dtype=torch.float16), dict(heads=12, kv_heads=12), dict(kv_heads=8)):
        assert kind(replace(CALL, **other)) != kind(CALL)


@pytest.mark.parametrize(("quantised", "first"), [(1.0, "sage"), (1.9, "sage"), (2.0 / MARGIN + 0.01, "exact"), (3.0, "exact")])
def test_a_kernel_that_quantises_must_win_clearly(quantised, first):
    clock = Clock()
    kernels = backend("exact", clock=clock, speed=2.0), backend("sage", exact=False, clock=clock, speed=quantised)
    made = Timings(None, kernels, clock.laps)
    made.ranked(CALL)
    made.measure(CPU)
    assert made.ranked(CALL)[0] == first


@pytest.mark.parametrize("after", [0, 1, 5, 40])
def test_a_kernel_that_fails_is_left_out_and_one_without_log_sum_exp_is_not_asked_for_it(after):
    error = RuntimeError("no")
    error.after = after  # calls that go well
    made, clock = table(backend("bad", error=error), "good", backend("plain", lse=False), "better", good=2.0, better=1.0)
    ring = replace(CALL, needs_lse=True)
    made.ranked(ring)
    made.measure(CPU)
    assert made.ranked(ring) == ("better", "good") and set(clock.calls) == {"good", "better"}


def test_a_kernel_that_is_there_on_request_only_is_neither_timed_nor_preferred():
    coarse = replace(backend("coarse", error=AssertionError("is not called")), on_request=True)
    made, _ = table(coarse, "good", "better", good=2.0, better=1.0)
    made.ranked(CALL)
    made.measure(CPU)
    made.table[kind(CALL)]["coarse"] = 0.1  # as an earlier release has remembered it
    assert made.ranked(CALL) == ("better", "good")


def test_where_all_kernels_fail_and_where_no_memory_is_left_the_kind_is_done(caplog):
    failing = backend("bad", error=RuntimeError("no"))
    full = backend("full", error=torch.cuda.OutOfMemoryError("none left"))
    for kernels in ([failing], ["good", full]):
        made, _ = table(*kernels, good=2.0)
        made.ranked(CALL)
        with caplog.at_level("INFO", "paradit"):
            assert made.measure(CPU) == [kind(CALL)] and made.table[kind(CALL)] == {} and not made.pending
    assert "bad could not be timed" in caplog.text and "no memory is free" in caplog.text


# -- fair rounds --------------------------------------------------------------------------------------------------------


def limited(full):
    """A kernel on a card that runs a fifth faster until it has worked for 60 ms."""
    return lambda number, now: full / (1.2 if now < 60 else 1.0)


@pytest.mark.parametrize("names", itertools.permutations(("pytorch", "cudnn", "sage")))
def test_the_order_of_backends_does_not_matter_on_a_card_that_slows_down_under_load(names):
    preferred, times = order(*names, pytorch=limited(5.35), cudnn=limited(5.40), sage=limited(4.92))
    assert preferred == ("sage", "pytorch", "cudnn")
    assert times == pytest.approx({"pytorch": 5.35, "cudnn": 5.40, "sage": 4.92})


@pytest.mark.parametrize("length", [0.05, 0.4, 5.0, 80.0])
def test_a_kernel_that_is_fast_only_in_its_first_calls_is_not_chosen(length):
    first = {0.05: 600, 0.4: 100, 5.0: 9, 80.0: 1}[length]
    preferred, times = order("sprinter", "steady", sprinter=lambda number, _: length * (0.5 if number < first else 1.1), steady=length)
    assert preferred == ("steady", "sprinter") and times == pytest.approx({"sprinter": 1.1 * length, "steady": length})


def test_of_short_kernels_those_calls_count_that_no_late_processor_held_up():
    def late(number, _now):
        return 0.4 if number % 4 == 0 else 0.9

    assert order("steady", "held up", **{"steady": 0.5, "held up": late})[0] == ("held up", "steady")


def test_of_long_kernels_a_few_fast_calls_do_not_count():
    assert order("steady", "lucky", steady=5.0, lucky=lambda number, _: 3.0 if number % 4 == 0 else 5.5)[0] == ("steady", "lucky")


@pytest.mark.parametrize("slowest", [0.001, 0.1, 3.0, 30.0])
def test_the_kernels_of_a_kind_take_turns_and_are_timed_in_well_under_a_second(slowest):
    made, clock = table("a", "b", "c", a=slowest, b=slowest / 2, c=slowest / 3)
    made.ranked(CALL)
    made.measure(CPU)
    assert clock.now < 600
    turns = clock.calls[3:]
    assert all(set(turns[at : at + 3]) == {"a", "b", "c"} for at in range(0, len(turns), 3))
    assert len({turns[at] for at in range(0, len(turns), 3)}) > 1, "who goes first changes"


def test_times_are_remembered_by_gpu_and_versions(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "times.json"
    made, _ = table("a", a=1.5, path=path)
    made.ranked(CALL)
    made.measure(CPU)
    for name, found in (("a GPU", ("a",)), ("another GPU", None)):
        monkeypatch.setattr(timings, "environment", lambda device, name=name: name)
        again = Timings(path)
        again.load(CPU)
        assert again.ranked(CALL) == found
    monkeypatch.setattr(timings, "environment", lambda device: "another GPU")
    again.timer, again.backends = made.timer, made.backends
    again.measure(CPU)
    assert set(json.loads(path.read_text())) == {"a GPU", "another GPU"}


@pytest.mark.parametrize("text", ["not json", "[1, 2]", '{"a GPU": 3}'])
def test_a_damaged_file_is_said_and_does_not_stop_a_run(tmp_path, monkeypatch, caplog, text):
    monkeypatch.setattr(timings, "environment", lambda device: "a GPU")
    path = tmp_path / "times.json"
    path.write_text(text)
    made = Timings(path)
    with caplog.at_level("WARNING", "paradit"):
        made.load(CPU)
    assert made.table == {} and "cannot be read" in caplog.text


def test_long_calls_are_timed_on_fewer_heads():
    video = replace(CALL, heads=40, kv_heads=8, q_len=75600, kv_len=75600)
    small = fewer_heads(video)
    assert small.heads == 5 * small.kv_heads and small.q_len == video.q_len and fewer_heads(CALL) == CALL
    each = 4 * small.q_len * small.kv_len * small.head_dim
    assert small.kv_heads == 1 or each * small.heads <= WORK


def test_the_chooser_goes_by_measurement_where_there_is_one_and_by_its_table_before():
    clock, speeds = Clock(), {"cudnn": 3.0, "flash": 2.0, "sage": 1.0}
    kernels = [backend(name, exact=name != "sage", clock=clock, speed=speed) for name, speed in speeds.items()]
    made = Timings(None, kernels, clock.laps)
    chosen = {}
    for setting in ("auto", "exact", "cudnn"):
        choice = Chooser(setting, table=kernels, timings=made)
        before = choice._decide(CALL).candidates[0].name
        choice.measure(CPU)
        chosen[setting] = before, choice._decide(CALL).candidates[0].name
    assert preferred(CALL)[0] == "cudnn"
    assert chosen == {"auto": ("cudnn", "sage"), "exact": ("flash", "flash"), "cudnn": ("cudnn", "cudnn")}


def test_another_rank_learns_the_times_and_measures_nothing():
    kernels = [backend("cudnn"), backend("flash")]
    made, clock = table(*kernels)
    choice = Chooser("auto", table=kernels, timings=made)
    assert choice._decide(CALL).candidates[0].name == "cudnn"
    choice.learn({kind(CALL): {"flash": 1.0, "cudnn": 2.0}})
    assert choice._decide(CALL).candidates[0].name == "flash" and clock.calls == []


def test_a_rank_with_fewer_heads_than_the_one_that_timed_takes_the_same_kernel():
    """30 heads on four ranks: the first has 8, the last 7."""
    made, _ = table("a", "b", a=1.0, b=1.0)
    first = replace(CALL, heads=8, kv_heads=8)
    made.table = {kind(replace(first, head_dim=64)): {"a": 1.0, "b": 2.0}, kind(first): {"b": 1.0, "a": 2.0}}
    fewer = replace(CALL, heads=7, kv_heads=7)
    assert made.ranked(fewer) == ("b", "a") and list(made.pending) == [kind(fewer)], "and it is timed where times are taken"
    assert made.ranked(replace(fewer, kv_len=9000)) is None
