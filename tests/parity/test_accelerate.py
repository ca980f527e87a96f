"""The one node for most people: what it sets, who wins over it, and when it does not split."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from parity import inprocess

JOB = inprocess.Job("flux", steps=3)


def resolved(*attached, steps=20, device="cpu", dynamic=False):
    """The settings of a run, and what was said."""
    import torch

    from para_core.comfy import accelerate

    said: list[str] = []
    patcher = SimpleNamespace(
        load_device=torch.device(device), is_dynamic=lambda: dynamic, model=SimpleNamespace(model_lowvram=False)
    )
    settings = {type(one).__name__: one for one in attached}
    return accelerate.fill(settings, patcher, steps=steps, say=said.append), said


def test_without_the_node_nothing_is_chosen(comfy):
    from para_core.settings import Attention

    assert resolved(Attention("cudnn")) == ({"Attention": Attention("cudnn")}, [])


def test_a_node_that_sets_a_part_itself_wins_and_the_rest_is_chosen(comfy):
    from para_core.cache.presets import PRESETS
    from para_core.settings import Accelerate, Attention, Cache, Compile, Parallel

    for own in (Attention("cudnn"), Cache(0.5), Parallel(3), Compile("compile")):
        kind = type(own).__name__
        for order in ((own, Accelerate(2)), (Accelerate(2), own)):
            found, _ = resolved(*order)
            assert found[kind] == own
            rest = {"Parallel": Parallel(2, careful=True), "Attention": Attention("auto"), "Compile": Compile("off")}
            rest["Cache"] = PRESETS["balanced"]
            del rest[kind]
            assert {name: found[name] for name in rest} == rest


@pytest.mark.parametrize("preset", ["quality", "balanced", "fast"])
def test_runs_of_few_steps_reuse_none_and_say_so(comfy, preset):
    from para_core.cache.presets import FEW_STEPS, PRESETS
    from para_core.settings import Accelerate

    found, said = resolved(Accelerate(cache=preset), steps=FEW_STEPS)
    (note,) = said
    assert "Cache" not in found and note.startswith(f"No step is cached: in a run of {FEW_STEPS} steps or fewer ")
    found, said = resolved(Accelerate(cache=preset), steps=FEW_STEPS + 1)
    assert found["Cache"] == PRESETS[preset] and said == []
    assert "Cache" not in resolved(Accelerate(cache="off"))[0]


def test_blocks_are_compiled_where_weights_stay_on_a_gpu(comfy, monkeypatch):
    from para_core.comfy import compiling
    from para_core.settings import Accelerate, Compile

    for there in (True, False):
        monkeypatch.setattr(compiling, "find_spec", lambda _name, there=there: object() if there else None)
        assert resolved(Accelerate(), device="cuda")[0]["Compile"] == Compile("compile+graph" if there else "off")
    monkeypatch.undo()
    assert resolved(Accelerate(), device="cuda", dynamic=True)[0]["Compile"] == Compile("off")
    assert resolved(Accelerate(), device="cpu")[0]["Compile"] == Compile("off")
    assert "Compile" not in resolved(Accelerate(compile="off"), device="cuda")[0]


@pytest.mark.parametrize("dynamic", ["", "copied", "kept"])
@pytest.mark.parametrize("allocator", ["native", "cudaMallocAsync"])
@pytest.mark.parametrize("lowvram", [False, True])
def test_graphs_need_weights_and_memory_that_stay_and_a_sentence_names_the_flags(comfy, monkeypatch, dynamic, allocator, lowvram):
    """``dynamic``: whether dynamic VRAM streams the model, and a run would take a copy whose weights stay."""
    import torch

    from para_core.comfy import static
    from para_core.comfy.compiling import against_graphs

    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: allocator)
    monkeypatch.setattr(static, "possible", lambda _patcher: dynamic == "copied")
    model = SimpleNamespace(model_lowvram=lowvram)
    patcher = SimpleNamespace(load_device=torch.device("cuda"), is_dynamic=lambda: bool(dynamic), model=model)
    reason = against_graphs(patcher, SimpleNamespace(setting="exact", previous=None))
    asynchronous = allocator != "native"
    moves = dynamic == "kept" or dynamic == "copied" and not asynchronous  # a copy was to be had, and was not
    assert bool(reason) is (moves or lowvram or asynchronous)
    assert ("--disable-dynamic-vram" in reason) is moves
    assert ("--disable-cuda-malloc" in reason) is (asynchronous and (moves or not lowvram))


@pytest.mark.parametrize(
    ("setting", "previous", "stock", "whose"),
    [(None, None, False, ""), ("exact", None, True, ""), (None, None, True, "--use-sage-attention"), (None, print, False, "another node")],
)
def test_kernels_of_others_are_not_captured(comfy, monkeypatch, setting, previous, stock, whose):
    import comfy.model_management
    import torch

    from para_core.comfy.compiling import against_graphs

    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(comfy.model_management, "sage_attention_enabled", lambda: stock)
    patcher = SimpleNamespace(load_device=torch.device("cuda"), is_dynamic=lambda: False, model=SimpleNamespace(model_lowvram=False))
    reason = against_graphs(patcher, SimpleNamespace(setting=setting, previous=previous))
    assert bool(reason) is bool(whose) and whose in reason
    assert "a.patch" in against_graphs(patcher, SimpleNamespace(setting="exact", previous=None), "a.patch in place of Flux.forward")


def unsplit(monkeypatch, settings):
    """A run for which no worker may start."""
    from para_core.group.group import Group

    for name in ("warm", "form"):
        monkeypatch.setattr(Group, name, lambda *_args: pytest.fail("a worker would start"))
    return inprocess.run(inprocess.load("flux"), JOB, settings)


def test_on_the_cpu_it_computes_what_stock_does_without_splitting_and_says_why(comfy, monkeypatch):
    from para_core.settings import Accelerate

    stock = inprocess.sample(inprocess.load("flux"), JOB)
    latent, report = unsplit(monkeypatch, Accelerate(gpus=2))
    assert report["ranks"] == 1 and inprocess.error(latent, stock) < 1e-6
    assert "This run is not split: CPU processes share one processor." in report["notes"]


@pytest.mark.parametrize(("block", "ranks"), [(0.1, 2), (1e-4, 1)], ids=["slow processor", "fast processor"])
def test_a_run_is_split_if_the_measured_link_is_fast_for_the_processor(comfy, monkeypatch, block, ranks):
    """The link is that of two real processes; the seconds that a block takes are the test's."""
    from para_core.comfy import split
    from para_core.execution import gain
    from para_core.plans import plan_for
    from para_core.settings import Accelerate

    model = inprocess.load("flux").model.diffusion_model
    work = gain.work_of(plan_for(model), model, 1, 35)
    monkeypatch.setattr(gain, "EAGER", 0.0)
    monkeypatch.setattr(gain, "matrix_rate", lambda device, dtype: work.operations / (gain.EFFICIENCY * work.layers * block))
    monkeypatch.setattr(gain, "memory_rate", lambda device: 1e9)
    monkeypatch.setattr(split, "processors_of_their_own", lambda device: True)
    stock = inprocess.sample(inprocess.load("flux"), JOB)
    latent, report = inprocess.run(inprocess.load("flux"), JOB, Accelerate(gpus=2, cache="off"))
    assert report["ranks"] == ranks and inprocess.error(latent, stock) < 1e-5
    assert any("on this link between the GPUs a step would take" in note for note in report["notes"]) is (ranks == 1)


def test_no_worker_starts_for_a_run_that_no_link_would_make_faster(comfy, monkeypatch):
    """A small model on a fast card: starting workers takes longer than the run, and they keep memory of every card."""
    from para_core.comfy import split
    from para_core.execution import gain
    from para_core.settings import Accelerate

    monkeypatch.setattr(split, "processors_of_their_own", lambda device: True)
    monkeypatch.setattr(gain, "matrix_rate", lambda device, dtype: 1e15)
    stock = inprocess.sample(inprocess.load("flux"), JOB)
    latent, report = unsplit(monkeypatch, Accelerate(gpus=8, cache="off"))
    assert report["ranks"] == 1 and inprocess.error(latent, stock) < 1e-6
    assert any("even on the fastest link between GPUs a step would take" in note for note in report["notes"])


@pytest.mark.parametrize(("there", "conditions", "kept"), [(0, 2, 1), (2, 2, 2), (7, 2, 7), (0, 1, 0)])
def test_no_more_workers_start_than_can_take_part_and_none_is_ended_for_that(comfy, monkeypatch, there, conditions, kept):
    """Prompt and negative prompt, or a prompt alone, of a model whose blocks are not cut, on eight cards."""
    from types import SimpleNamespace

    from para_core.comfy.split import Split
    from para_core.sequence.mesh import Degrees

    expected: list[str] = []
    found = object.__new__(Split)
    found.devices, found._degrees = [f"cuda:{index}" for index in range(1, 8)], {}
    closed: list[bool] = []
    found._estimate = SimpleNamespace(close=lambda: closed.append(True))
    found.group = SimpleNamespace(members=[None] * there, expect=expected.extend)
    found.session = SimpleNamespace(
        parallel=SimpleNamespace(careful=True), patcher=SimpleNamespace(load_device="cpu"), options={"transformer_options": {}}
    )
    monkeypatch.setattr("comfy.model_management.free_memory", lambda *_args: None)
    for name, value in {"_loses": "", "_compare": None}.items():
        monkeypatch.setattr(Split, name, lambda *_args, value=value: value)
    monkeypatch.setattr(Split, "degrees", lambda self, rows, options: Degrees(batch=min(rows, 8)))
    found._recruit((1, 4, 64, 64), dict.fromkeys(("positive", "negative")[:conditions], [None]))
    assert expected == found.devices and len(expected) == kept and bool(closed) is not bool(kept)


def test_a_run_is_not_split_where_launching_takes_longer_than_computing(comfy, monkeypatch):
    from para_core.comfy import split
    from para_core.execution import gain
    from para_core.settings import Accelerate

    monkeypatch.setattr(gain, "matrix_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr(gain, "EAGER", 100.0)
    monkeypatch.setattr(split, "processors_of_their_own", lambda device: True)
    _, report = unsplit(monkeypatch, Accelerate(gpus=2, cache="off"))
    assert report["ranks"] == 1 and any("wait for the processor" in note for note in report["notes"])


def test_a_run_is_not_split_with_a_card_for_which_the_others_would_wait(comfy, monkeypatch):
    from para_core.comfy import split
    from para_core.execution import gain
    from para_core.group.group import Group
    from para_core.settings import Accelerate

    monkeypatch.setattr(gain, "matrix_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr(split, "processors_of_their_own", lambda device: True)
    monkeypatch.setattr(gain, "unlike", lambda devices: len(devices) == 2)
    monkeypatch.setattr(Group, "rates", lambda self, dtype: (2e7,))
    _, report = inprocess.run(inprocess.load("flux"), JOB, Accelerate(gpus=2, cache="off"))
    assert report["ranks"] == 1 and report["shares"] is None
    assert any("with a GPU of 2% of the first one's speed" in note for note in report["notes"])
