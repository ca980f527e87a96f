"""A model that dynamic VRAM streams is sampled with weights that stay where blocks are compiled; a stand-in for its patcher."""

from __future__ import annotations

import gc
from types import MethodType, SimpleNamespace

import pytest
import torch
from parity.inprocess import Job, attached, error, load, reports, sample

from para_core.settings import Accelerate, Attention, Compile

JOB = Job("flux_small")
pytestmark = pytest.mark.usefixtures("comfy")


@pytest.fixture
def streamed(monkeypatch):
    """What a loader gives under dynamic VRAM, as far as the pack looks at it; ``.reads`` counts the times its file was read."""
    import comfy.model_patcher

    from para_core.comfy import static

    class Streamed(comfy.model_patcher.ModelPatcher):
        non_dynamic_delegate_model = None

        def is_dynamic(self) -> bool:
            return True

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "is_dynamic", lambda _self: False)
    model = load(JOB.kind).clone()
    model.__class__, model.parent = Streamed, None
    read, *rest = model.cached_patcher_init
    counted = SimpleNamespace(model=model, reads=0, static=static)

    def again(*args, **kwargs):
        counted.reads += 1
        assert kwargs.pop("disable_dynamic")
        return read(*args, **kwargs)

    model.cached_patcher_init = (again, *rest)
    return counted


def test_a_run_that_compiles_reads_the_file_once_for_all_models_of_a_loader(streamed) -> None:
    expected = sample(load(JOB.kind), JOB)
    model = attached(streamed.model, Compile("compile"))
    held = model.model
    for _ in range(2):
        with reports() as lines:
            assert error(sample(model, JOB), expected) < 1e-6
        assert lines[0]["notes"] == []
    other = attached(streamed.model, Attention("pytorch"), Compile("compile"))
    assert error(sample(other, JOB), expected) < 1e-6
    assert streamed.reads == 1
    copy = vars(model)[streamed.static._COPY]
    assert copy.model is not held and copy.model is vars(other)[streamed.static._COPY].model
    assert model.model is held and not copy.is_dynamic(), "the node's own model stays as it was"


def test_patches_travel_with_the_copy(streamed) -> None:
    model = attached(streamed.model, Compile("compile"))
    sample(model, JOB)
    result = sample(add(model), JOB)
    assert error(result, sample(add(load(JOB.kind)), JOB)) < 1e-6 < error(result, sample(load(JOB.kind), JOB))
    assert streamed.reads == 1


def add(model):
    """A clone with one weight moved, by a patch."""
    model = model.clone()
    name = "diffusion_model.img_in.weight"
    shift = 0.1 * torch.randn(model.get_model_object(name).shape, generator=torch.Generator().manual_seed(3))
    assert model.add_patches({name: (shift,)}) == [name]
    return model


def test_code_that_a_node_has_put_on_a_layer_runs_on_the_layer_that_it_was_made_for(streamed) -> None:
    def patched(model):
        model = add(model)
        layer = model.get_model_object("diffusion_model").img_in
        model.add_object_patch("diffusion_model.img_in.forward", MethodType(lambda self, x: 2 * type(self).forward(self, x), layer))
        return model

    expected = sample(patched(load(JOB.kind)), JOB)
    assert error(sample(attached(patched(streamed.model), Compile("compile")), JOB), expected) < 1e-6
    assert error(expected, sample(add(load(JOB.kind)), JOB)) > 1e-3 and streamed.reads == 0


def test_what_the_last_run_has_left_in_the_model_does_not_count(streamed) -> None:
    name, other = "diffusion_model.double_blocks.0.img_attn.qkv", streamed.model.clone()
    method = MethodType(lambda self, x: type(self).forward(self, x), other.get_model_object(name))
    other.add_object_patch(f"{name}.forward", method)
    sample(attached(other, Compile("compile")), JOB)
    assert streamed.reads == 0
    sample(attached(streamed.model, Compile("compile")), JOB)
    assert streamed.reads == 1


def test_a_copy_can_be_unloaded_when_the_node_s_own_model_has_gone(streamed) -> None:
    import comfy.model_management

    comfy.model_management.unload_all_models()
    model = attached(streamed.model, Compile("compile"))
    sample(model, JOB)
    copied = vars(model)[streamed.static._COPY].model
    del model
    gc.collect()
    (entry,) = [loaded for loaded in comfy.model_management.current_loaded_models if loaded.real_model() is copied]
    assert entry.model is not None and not entry.is_dead()
    comfy.model_management.unload_all_models()
    assert not [loaded for loaded in comfy.model_management.current_loaded_models if loaded.real_model() is copied]
    assert error(sample(attached(streamed.model, Compile("compile")), JOB), sample(load(JOB.kind), JOB)) < 1e-6
    assert streamed.reads == 1


def test_a_model_of_which_nothing_would_be_compiled_is_not_copied(streamed, monkeypatch) -> None:
    from para_core.comfy import compiling, objects

    for place, name, found in ((compiling, "plan_for", None), (objects, "block_method", "code in place of a part")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, lambda *_, found=found: found)
            sample(attached(streamed.model, Compile("compile")), JOB)
    assert streamed.reads == 0


@pytest.mark.parametrize("settings", [Attention("pytorch"), Compile("off")], ids=lambda one: type(one).__name__)
def test_a_run_that_does_not_compile_leaves_the_model_where_it_is(streamed, settings) -> None:
    sample(attached(streamed.model, settings), JOB)
    assert streamed.reads == 0


def test_what_does_not_fit_is_not_copied(streamed, monkeypatch) -> None:
    import comfy.model_management

    model = attached(streamed.model, Compile("compile"))
    assert streamed.static.possible(model)
    size = model.model_size()
    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "get_total_memory", lambda _device: 1.2 * size)
        assert not streamed.static.possible(model)
    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "get_free_memory", lambda _device: 1.1 * size)
        assert not streamed.static.possible(model)
    model.cached_patcher_init = None
    assert not streamed.static.possible(model), "another node's loader has left no record"


def test_a_file_that_has_gone_costs_the_compiled_blocks_no_image(streamed) -> None:
    model = attached(streamed.model, Compile("compile"))

    def gone(*_args, **_kwargs):
        raise FileNotFoundError("no such file")

    model.cached_patcher_init = (gone, *model.cached_patcher_init[1:])
    with reports() as lines:
        assert error(sample(model, JOB), sample(load(JOB.kind), JOB)) < 1e-6
    assert any("could not be read again (no such file)" in note for note in lines[0]["notes"])


def test_accelerate_compiles_what_can_stay(streamed, monkeypatch) -> None:
    from para_core.comfy import compiling

    monkeypatch.setattr(compiling, "find_spec", lambda _name: object())
    device = SimpleNamespace(load_device=torch.device("cuda"), model=SimpleNamespace(model_lowvram=False), is_dynamic=lambda: True)
    device.object_patches = {"diffusion_model.default_ref_method": "offset", "model_sampling": object()}
    monkeypatch.setattr(streamed.static, "possible", lambda _patcher: True)
    assert compiling.chosen(device) == Compile("compile+graph")
    monkeypatch.setattr(streamed.static, "possible", lambda _patcher: False)
    assert compiling.chosen(device) == Compile("off")
    assert Accelerate().compile == "auto"
    monkeypatch.setattr(streamed.static, "possible", lambda _patcher: True)
    device.object_patches = {"diffusion_model.blocks.0.cross_attn.forward": print}
    assert compiling.chosen(device) == Compile("off")


@pytest.mark.parametrize(("small", "mode"), [(True, "compile+graph"), (False, "off")])
def test_what_was_unloaded_in_part_after_the_last_prompt_is_compiled_if_it_may_be_loaded_whole(monkeypatch, small: bool, mode: str) -> None:
    from para_core.comfy import compiling, static

    monkeypatch.setattr(compiling, "find_spec", lambda _name: object())
    monkeypatch.setattr(static, "small", lambda _patcher: small)
    device = SimpleNamespace(load_device=torch.device("cuda"), model=SimpleNamespace(model_lowvram=True), is_dynamic=lambda: False)
    assert compiling.chosen(device) == Compile(mode)


def test_weights_have_the_type_that_the_model_computes_with() -> None:
    from para_core.comfy import static

    layers = [torch.nn.Linear(3, 2, dtype=torch.float32), torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)]
    for layer, dtype in zip(layers, (torch.bfloat16, torch.float32, None), strict=True):
        layer.weight_comfy_model_dtype = layer.bias_comfy_model_dtype = dtype
    expected, kept = layers[0].weight.detach().to(torch.bfloat16), layers[1].weight
    static.convert(torch.nn.Sequential(*layers))
    assert torch.equal(layers[0].weight, expected) and layers[0].bias.dtype == torch.bfloat16
    assert layers[1].weight is kept and layers[2].weight.dtype == torch.float32
