"""Code that other packs write into a model itself, for good or for the time of a call: only ComfyUI's own process has it."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from parity.inprocess import Job, attached, changed, error, footprint, load, run, sample

from para_core.settings import Cache, Compile, Parallel

pytestmark = pytest.mark.usefixtures("comfy")
TOLERANCE = 1e-5  # relative, per forward, float32
JOB = Job("flux_small", cfg=3.0, tokens=(11, 7), steps=4)
CUTS = {"prompts": Parallel(2, batch_degree=2), "tokens": Parallel(2, batch_degree=1)}


def network() -> Any:
    return load("flux_small").model.diffusion_model


class Blocks(torch.nn.Module):
    """All blocks of a list as one that leaves the later ones out now and then, as step caches of other packs do."""

    def __init__(self, blocks: torch.nn.ModuleList):
        super().__init__()
        self.blocks, self.calls = blocks, 0

    def forward(self, img: Any, txt: Any, **kwargs: Any) -> Any:
        self.calls += 1
        for index, block in enumerate(self.blocks):
            if index == 0 or self.calls % 3:
                img, txt = block(img=img, txt=txt, **kwargs)
        return img, txt


def louder(part: torch.nn.Module, name: str = "forward") -> AbstractContextManager:
    """``part`` with a method of another pack."""
    original = getattr(part, name)
    return patch.object(part, name, types.MethodType(lambda _self, x, *args, **kwargs: original(x * 1.2, *args, **kwargs), part))


def other_list() -> AbstractContextManager:
    return patch.object(network(), "double_blocks", torch.nn.ModuleList([Blocks(network().double_blocks)]))


@contextmanager
def hook() -> Iterator[None]:
    handle = network().img_in.register_forward_hook(lambda _module, _args, output: output * 1.2)
    yield
    handle.remove()


def of_the_class() -> AbstractContextManager:
    kind = type(network().single_blocks[1])
    original = kind.forward
    return patch.object(kind, "forward", lambda self, x, *args, **kwargs: original(self, x * 1.2, *args, **kwargs))


WRITTEN: dict[str, Callable[[], AbstractContextManager]] = {
    "a method of the model": lambda: louder(network(), "forward_orig"),
    "the entry method": lambda: louder(network(), "_forward"),
    "a method of a block": lambda: louder(network().single_blocks[1].linear1),
    "a hook": hook,
    "a method of a class": of_the_class,
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("what", WRITTEN)
@pytest.mark.parametrize("ranks", [2])
def test_what_is_written_into_a_model_keeps_its_runs_on_one_rank(
    what: str, cut: str, ranks: int, caplog: pytest.LogCaptureFixture
) -> None:
    with WRITTEN[what]():
        expected = sample(load("flux_small"), JOB)
        result = sample(attached(load("flux_small"), CUTS[cut]), JOB)
    assert torch.equal(result, expected)
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING" and record.name == "paradit"]
    assert "This run stays on one GPU" in said and "test_foreign" in said
    assert run(load("flux_small"), JOB, CUTS[cut])[1]["ranks"] == ranks


@pytest.mark.parametrize("settings", [(Compile("compile"),), (Parallel(2, batch_degree=1), Compile("compile"), Cache(1e9))])
@pytest.mark.parametrize("ranks", [2])
def test_a_block_s_own_method_is_what_runs(settings: tuple, ranks: int) -> None:
    with louder(network().single_blocks[1]):
        expected = sample(load("flux_small"), JOB)
        result, report = run(load("flux_small"), JOB, *settings)
    assert torch.equal(result, expected) and any("compiled blocks are left out" in note for note in report["notes"])


def for_the_time_of_a_call(exchange: Callable[[], AbstractContextManager]) -> Any:
    """A clone of the model around every call of which something in it is exchanged."""

    def wrapper(apply: Callable, args: dict[str, Any]) -> torch.Tensor:
        with exchange():
            return apply(args["input"], args["timestep"], **args["c"])

    model = load("flux_small").clone()
    model.set_model_unet_function_wrapper(wrapper)
    return model


EXCHANGED: dict[str, Callable[[], AbstractContextManager]] = {
    "a method of the model": WRITTEN["a method of the model"],
    "a list of blocks": other_list,
    "fewer blocks": lambda: patch.object(network(), "single_blocks", network().single_blocks[:-1]),
    "a method of a block": lambda: louder(network().single_blocks[1]),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("what", EXCHANGED)
@pytest.mark.parametrize("ranks", [2])
def test_what_is_exchanged_for_the_time_of_a_call_is_seen_before_ranks_share_it(what: str, cut: str, ranks: int) -> None:
    before = sorted(footprint(network()))  # exchanging puts a list behind the others
    expected = sample(for_the_time_of_a_call(EXCHANGED[what]), JOB)
    result, report = run(for_the_time_of_a_call(EXCHANGED[what]), JOB, CUTS[cut])
    assert error(result, expected) < TOLERANCE and report["ranks"] == 1
    assert len(report["notes"]) == 1 and "in place of" in report["notes"][0]
    assert not changed(before, sorted(footprint(network()))), "two calls were under way at once: each put back what it had found"


def test_steps_are_not_skipped_by_a_first_block_that_does_not_show_what_others_change() -> None:
    model = for_the_time_of_a_call(EXCHANGED["a method of the model"])
    expected = sample(model, JOB)
    result, report = run(model, JOB, Cache(1e9))
    assert torch.equal(result, expected) and report["cached"] == 0 and "forward_orig" in report["notes"][0]


@pytest.mark.parametrize("what", ["a method of a block", "for the time of a call"])
def test_graphs_are_told_of_code_that_may_decide_anew_at_every_step(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from para_core.comfy import compiling

    told: list[str] = []
    monkeypatch.setattr(compiling, "against_graphs", lambda _patcher, _chooser, code: told.append(code) or "No CUDA graphs.")
    if what in WRITTEN:
        with WRITTEN[what]():
            run(load("flux_small"), JOB, Compile("graph"))
    else:
        run(for_the_time_of_a_call(EXCHANGED["a method of the model"]), JOB, Compile("graph"))
    assert len(told) == 2 * JOB.steps and all("in place of" in code for code in told)


@pytest.mark.parametrize("ranks", [2])
@pytest.mark.parametrize("place", ["apply_model", "diffusion_model"])
def test_wrappers_of_a_call_are_left_before_they_are_entered_again(place: str, ranks: int) -> None:
    inside, most = 0, 0

    def wrapper(executor: Callable, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        try:
            return executor(*args, **kwargs)
        finally:
            inside -= 1

    model = load("flux_small").clone()
    model.add_wrapper_with_key(place, "test", wrapper)
    expected = sample(model, JOB)
    result, report = run(attached(model), JOB, CUTS["prompts"])
    assert error(result, expected) < TOLERANCE * report["forwards"] and most == 1


def test_how_another_pack_makes_and_loads_layers_is_nothing_that_ranks_need() -> None:
    from para_core.comfy import objects

    original = torch.nn.Linear.reset_parameters
    with patch.object(torch.nn.Linear, "reset_parameters", lambda layer: original(layer)):
        assert not objects.foreign(network())
    with patch.object(torch.nn.Linear, "extra_repr", lambda layer: ""):
        assert "test_foreign" in objects.foreign(network())


@pytest.mark.slow
def test_nothing_of_comfyui_itself_is_taken_for_another_pack() -> None:
    from families.cases import CASES, UNCUT

    from para_core.comfy import objects

    found = {name: objects.foreign(make()[0]) for name, make in {**CASES, **UNCUT}.items()}
    assert not {name: what for name, what in found.items() if what}


def test_a_whole_model_that_another_node_compiles_says_which_node_to_use(caplog: pytest.LogCaptureFixture) -> None:
    class Compiled(torch.nn.Module):
        def __init__(self, module: torch.nn.Module):
            super().__init__()
            self._orig_mod = module

        def __getattr__(self, name: str) -> Any:
            return super().__getattr__(name) if name == "_orig_mod" else getattr(self._orig_mod, name)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self._orig_mod(*args, **kwargs)

    model = load("flux_small").clone()
    model.add_object_patch("diffusion_model", Compiled(network()))
    result = sample(attached(model, CUTS["tokens"]), JOB)
    assert torch.equal(result, sample(load("flux_small"), JOB))
    assert "Another node compiles the whole model (use Compile Blocks in its place)" in caplog.text


def test_graphs_are_left_out_where_a_patch_runs_inside_blocks_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from para_core.comfy import compiling

    monkeypatch.setattr(compiling, "against_graphs", lambda *_: "")
    model = load("flux_small").clone()
    model.set_model_attn1_output_patch(lambda out, _extra: out)
    _, report = run(model, JOB, Compile("graph"))
    (note,) = report["notes"]
    assert note.startswith("No CUDA graphs where the attn1_output_patch") and note.endswith("a graph repeats kernels, not code.")
