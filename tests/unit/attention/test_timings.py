"""The choice of a kernel by measurement: what is timed, what is remembered, and who is preferred."""

from __future__ import annotations

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


def backend(name, *, exact=True, missing=None, refusal=None, lse=True, error=None):
    def run(q, k, v, *, mask, scale):
        if error is not None:
            raise error
        return q

    return Backend(name, exact, "", lambda: missing, lambda request: refusal, run, run if lse else None)


def table(*backends, speed, path=None):
    """Timings by a clock that knows each kernel's speed; ``calls`` counts what was timed."""
    by_code = {id(one.run): one.name for one in backends}
    calls = []

    def timer(call, device):
        call()
        name = by_code[id(call.func)]
        calls.append(name)
        return speed[name]

    made = Timings(path, backends, timer)
    made._environment = "a GPU"
    return made, calls


def test_a_kind_of_call_is_noted_first_and_timed_once_by_every_kernel_that_takes_it():
    kernels = [backend("a"), backend("b"), backend("no", missing="not installed"), backend("not this", refusal="it takes no mask")]
    made, calls = table(*kernels, speed={"a": 2.0, "b": 1.0})
    assert made.ranked(CALL) is None and made.ranked(CALL) is None and list(made.pending) == [kind(CALL)]
    assert made.measure(CPU) == [kind(CALL)] and calls == ["a", "b"] and not made.pending
    assert made.ranked(CALL) == ("b", "a") and made.measure(CPU) == [] and calls == ["a", "b"]


def test_calls_on_the_cpu_are_never_timed():
    made, _ = table(backend("a"), speed={"a": 1.0})
    assert made.ranked(replace(CALL, device_type="cpu")) is None and not made.pending


def test_near_lengths_are_one_kind_and_others_are_not():
    near, far = replace(CALL, q_len=41, kv_len=72), replace(CALL, q_len=80)
    assert kind(near) == kind(CALL) != kind(far)
    for other in (dict(mask="bool"), dict(needs_lse=True), dict(dtype=torch.float16), dict(heads=12, kv_heads=12), dict(kv_heads=8)):
        assert kind(replace(CALL, **other)) != kind(CALL)


@pytest.mark.parametrize(("quantised", "first"), [(1.0, "sage"), (1.9, "sage"), (2.0 / MARGIN + 0.01, "exact"), (3.0, "exact")])
def test_a_kernel_that_quantises_must_win_clearly(quantised, first):
    made, _ = table(backend("exact"), backend("sage", exact=False), speed={"exact": 2.0, "sage": quantised})
    made.ranked(CALL)
    made.measure(CPU)
    assert made.ranked(CALL)[0] == first


def test_a_kernel_that_fails_is_left_out_and_one_without_log_sum_exp_is_not_asked_for_it():
    kernels = [backend("bad", error=RuntimeError("no")), backend("plain", lse=False), backend("good")]
    made, calls = table(*kernels, speed={"good": 2.0})
    ring = replace(CALL, needs_lse=True)
    made.ranked(ring)
    made.measure(CPU)
    assert made.ranked(ring) == ("good",) and calls == ["good"]


def test_times_are_remembered_by_gpu_and_versions(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "times.json"
    made, _ = table(backend("a"), speed={"a": 1.5}, path=path)
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
    kernels = [backend("cudnn"), backend("flash"), backend("sage", exact=False)]
    made, _ = table(*kernels, speed={"cudnn": 3.0, "flash": 2.0, "sage": 1.0})
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
    made, calls = table(*kernels, speed={})
    choice = Chooser("auto", table=kernels, timings=made)
    assert choice._decide(CALL).candidates[0].name == "cudnn"
    choice.learn({kind(CALL): {"flash": 1.0, "cudnn": 2.0}})
    assert choice._decide(CALL).candidates[0].name == "flash" and calls == []
