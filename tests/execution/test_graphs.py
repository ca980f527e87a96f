"""Captures: what they are identified by, when they go, how many there are, and what becomes of a run that cannot capture.

CUDA graphs are stood in for by recordings of CPU operations (``fake_graphs``).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from execution import fake_graphs

from para_core.execution.graphs import LIMIT, SEAM, WARM, Graphs


@pytest.fixture
def card() -> Iterator[fake_graphs.Card]:
    with fake_graphs.installed() as found:
        yield found


class Model:
    """A forward that counts its calls, and fails in those that ``fails`` picks, in the middle."""

    def __init__(self) -> None:
        self.weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
        self.calls = 0
        self.fails = lambda: None

    def __call__(self, x: torch.Tensor, *, factor: float = 1.0, table: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += 1
        y = (x @ self.weight).tanh_()
        self.fails()
        return y.mul(factor) if table is None else y * table

    def expected(self, x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        return (x @ self.weight).tanh() * factor


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def graphs(card, said) -> Graphs:
    return Graphs(said.append, "cpu")


def rows(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))


def captured(graphs: Graphs, model: Model, x: torch.Tensor, *context, **kwargs) -> torch.Tensor:
    for _ in range(WARM + 1):
        result = graphs.run(model, (x,), kwargs, *context)
    return result


def test_a_shape_is_captured_once_and_replayed_with_new_numbers(graphs, model, card):
    for seed in range(WARM + 4):
        x = rows(5, seed).T.contiguous().T if seed % 2 else rows(5, seed)  # another memory layout is no other shape
        assert torch.equal(graphs.run(model, (x,), {}), model.expected(x))
    assert model.calls == WARM + 1 and card.begun == 1 and graphs.replays == card.replayed == 4


@pytest.mark.parametrize(("calls", "parts"), [(SEAM - 1, 1), (SEAM, 2), (3 * SEAM, 2)])
def test_a_forward_is_captured_in_two_graphs(graphs, model, card, calls, parts):
    def attends() -> None:
        for _ in range(calls):
            graphs.attended()

    model.fails = attends
    for seed in range(WARM + 4):
        assert torch.equal(graphs.run(model, (rows(5, seed),), {}), model.expected(rows(5, seed)))
    assert card.begun == parts and graphs.replays == 4 and card.replayed == 4 * parts


@pytest.mark.parametrize("hit", [False, True])
def test_with_a_cache_what_it_may_skip_is_captured_in_two_graphs_of_its_own(graphs, model, card, hit):
    cache = SimpleNamespace(tap=None, step=object(), hit=hit, observe=lambda *_: None, finish=lambda *_: None)

    def attends() -> None:
        if cache.tap is not None:
            cache.tap.after_first([], [])
        for _ in range(SEAM):
            graphs.attended()
        if cache.tap is not None:
            cache.tap.after_last([])

    model.fails = attends
    for seed in range(WARM + 2):
        assert torch.equal(graphs.run(model, (rows(5, seed),), {}, cache=cache), model.expected(rows(5, seed)))
    assert card.begun == 4 and card.replayed == 2 * (2 if hit else 4)


def test_where_its_second_part_cannot_be_captured_the_first_goes_too(graphs, model, card, said):
    def fails() -> None:
        for _ in range(SEAM):
            graphs.attended()
        if card.begun == 2:
            raise RuntimeError("no")

    model.fails = fails
    assert torch.equal(graphs.run(model, (rows(4),), {}), model.expected(rows(4)))
    with pytest.raises(RuntimeError, match="no"):  # outside of a capture, too
        graphs.run(model, (rows(4),), {})
    gc.collect()
    assert not card.alive and not graphs.captures


def test_a_result_stays_as_it_is_when_the_capture_is_replayed(graphs, model):
    first = captured(graphs, model, rows(4, 1))
    graphs.run(model, (rows(4, 2),), {})
    assert torch.equal(first, model.expected(rows(4, 1)))


def test_weights_that_are_changed_in_place_count_from_then_on(graphs, model):
    captured(graphs, model, rows(4))
    model.weight.mul_(-2)
    assert torch.equal(graphs.run(model, (rows(4),), {}), model.expected(rows(4)))


@pytest.mark.parametrize(
    ("count", "context", "kwargs"),
    [
        (6, "mesh", {}),
        (4, "another mesh", {}),
        (4, "mesh", {"factor": 2.0}),
        (4, "mesh", {"table": torch.ones(3)}),
        (4, "mesh", {"table": torch.ones(1)}),
    ],
    ids=["shape", "mesh", "value", "argument", "argument's shape"],
)
def test_a_call_of_another_kind_has_a_capture_of_its_own(graphs, model, card, count, context, kwargs):
    captured(graphs, model, rows(4), "mesh")
    captured(graphs, model, rows(4), "mesh", table=torch.ones(2, 1, 3))
    calls = model.calls
    result = captured(graphs, model, rows(count), context, **kwargs)
    assert card.begun == 3 and model.calls == calls + WARM + 1
    assert torch.equal(result, model.expected(rows(count), kwargs.get("factor", 1.0)))


def test_as_many_captures_are_alive_as_are_allowed_the_latest_used_ones(graphs, model, card):
    for count in range(1, LIMIT + 1):
        captured(graphs, model, rows(count))
    graphs.run(model, (rows(1),), {})  # used again: not the one that goes
    for count in range(LIMIT + 1, LIMIT + 4):
        captured(graphs, model, rows(count))
        gc.collect()
        assert len(graphs.captures) == len(card.alive) == LIMIT
    calls = model.calls
    for count in (1, LIMIT + 3):
        captured(graphs, model, rows(count))
    assert model.calls == calls
    assert torch.equal(graphs.run(model, (rows(2),), {}), model.expected(rows(2))) and model.calls == calls + 1


def test_shapes_in_turn_are_not_captured_anew_each_time(graphs, model, card):
    """One more than captures are kept for, in a fixed order: the one used last is always the one that is needed next."""
    for step in range(8):
        for count in range(1, LIMIT + 2):
            assert torch.equal(graphs.run(model, (rows(count, step),), {}), model.expected(rows(count, step)))
    assert card.begun == LIMIT + 1 and model.calls == (LIMIT + 1) * (WARM + 1) + 8 - WARM - 1
    graphs.drop()
    captured(graphs, model, rows(1))
    assert card.begun == LIMIT + 2, "after other weights or kernels all begin anew"


def test_a_model_may_give_several_tensors_or_none(graphs, model):
    """As LTX-2 does, a picture and a sound."""
    found = [graphs.run(lambda x: [model(x), (x * 2, None)], (rows(4, seed),), {}) for seed in range(WARM + 3)]
    for seed, (one, (other, nothing)) in enumerate(found):
        assert torch.equal(one, model.expected(rows(4, seed))), "a result stays as it is"
        assert torch.equal(other, rows(4, seed) * 2) and nothing is None
    assert graphs.replays == 3


def test_all_captures_of_all_runs_are_made_on_one_stream(graphs, model, card):
    """cuBLAS keeps memory for every stream it has been used on."""
    for count in range(1, 4):
        captured(graphs, model, rows(count))
        captured(Graphs(print, "cpu"), model, rows(count))
    assert card.begun == 6 and card.streams == 1


def test_dropping_frees_every_capture_and_what_was_kept_for_them(graphs, model, card):
    captured(graphs, model, rows(4))
    graphs.constants.held["table"] = torch.ones(1)
    graphs.drop()
    gc.collect()
    assert not graphs.captures and not card.alive and not graphs.constants.held
    calls = model.calls
    captured(graphs, model, rows(4))
    assert model.calls == calls + WARM + 1 and card.begun == 2


def fails_at(model: Model, *numbers: int, error: BaseException | None = None):
    """Calls (counted from 1) that raise."""

    def fails() -> None:
        if model.calls in numbers:
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore about it")

    model.fails = fails


def test_a_capture_that_fails_costs_the_graphs_of_the_run_and_one_sentence(graphs, model, card, said):
    captured(graphs, model, rows(3))
    fails_at(model, model.calls + WARM + 1)
    for seed in range(4):
        assert torch.equal(graphs.run(model, (rows(4, seed),), {}), model.expected(rows(4, seed)))
    gc.collect()
    assert said == ["This run goes on without CUDA graphs: CUDA out of memory. Tried to allocate 20 GiB."]
    assert not graphs.captures and not card.alive and card.begun == 2 and not card.told
    assert torch.equal(graphs.run(model, (rows(3),), {}), model.expected(rows(3))) and card.begun == 2


def test_what_fails_without_a_capture_too_is_no_fault_of_graphs(graphs, model, card, said):
    """A lost peer, or a step that one card cannot do."""
    fails_at(model, WARM + 1, WARM + 2)
    for _ in range(WARM):
        graphs.run(model, (rows(4),), {})
    with pytest.raises(torch.OutOfMemoryError):
        graphs.run(model, (rows(4),), {})
    gc.collect()
    assert not said and graphs.failure is None and not card.alive
    assert torch.equal(captured(graphs, model, rows(4)), model.expected(rows(4))) and graphs.replays == 1


def test_a_cancel_in_the_middle_of_a_capture_ends_it(graphs, model, card, said):
    class Cancelled(BaseException):
        pass

    fails_at(model, WARM + 1, error=Cancelled())
    for _ in range(WARM):
        graphs.run(model, (rows(4),), {})
    with pytest.raises(Cancelled):
        graphs.run(model, (rows(4),), {})
    assert card.recording.graph is None and not graphs.captures and not graphs.constants.answering and not said
    assert torch.equal(captured(graphs, model, rows(4)), model.expected(rows(4))) and graphs.replays == WARM + 1


@pytest.mark.parametrize("name", ["_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"], ids=["torch 2.8", "before"])
def test_a_capture_that_CUDA_has_called_off_is_one_for_torch_s_allocator_too(graphs, model, card, said, name, monkeypatch):
    if name not in card.names:
        monkeypatch.delattr(torch.cuda.memory, card.names[0])
        monkeypatch.setattr(torch.cuda.memory, name, lambda _device, pool: card.told.append(f"{name} {pool}"), raising=False)
    fails_at(model, WARM + 1, error=RuntimeError("CUDA error: operation not permitted when stream is capturing"))
    card.called_off = True
    for _ in range(WARM + 2):
        assert torch.equal(graphs.run(model, (rows(4),), {}), model.expected(rows(4)))
    assert card.told == [f"{name} pool", "_cuda_releasePool pool"]
    assert said == ["This run goes on without CUDA graphs: CUDA error: operation not permitted when stream is capturing"]


@pytest.mark.parametrize(("kernel", "held"), [("plain", True), ("on another stream", False), ("refused", False), ("broken", False)])
def test_a_kernel_that_a_graph_does_not_hold_is_found_out(card, kernel, held):
    from para_core.attention.capture import is_captured

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_options) -> torch.Tensor:
        if kernel == "broken":
            raise AssertionError("SM89 kernel is not available")
        graph, card.recording.graph = card.recording.graph, None if kernel == "on another stream" else card.recording.graph
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        card.recording.graph = graph
        if graph is not None and kernel == "refused":
            card.called_off = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return out

    backend = SimpleNamespace(name=kernel, run=run)
    assert is_captured(backend, torch.device("cpu"), torch.float32, 16) is held
    assert bool(card.told) is (kernel == "refused") and card.recording.graph is None
