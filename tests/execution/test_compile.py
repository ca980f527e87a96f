"""Compiled blocks: the same numbers, no graph breaks, bounded recompiles, and stock execution where they cannot run.

Blocks are compiled with a backend that only traces; one test uses the real one.
"""

from __future__ import annotations

import pytest
import torch

said: list[str] = []


@pytest.fixture
def tiny(comfy):
    """A seeded FLUX or Wan of two or four blocks, and a call of it: function, positional names, args, kwargs."""
    from comfy.ldm.flux.model import Flux
    from comfy.ldm.wan.model import WanModel
    from comfy.ops import disable_weight_init

    common = {"dtype": torch.float32, "device": "cpu", "operations": disable_weight_init}

    def make(family: str):
        torch.manual_seed(0)
        if family == "flux":
            model = Flux(
                image_model="flux", in_channels=16, out_channels=16, patch_size=2, vec_in_dim=24, context_in_dim=40, hidden_size=96,
                mlp_ratio=2.0, num_heads=6, depth=2, depth_single_blocks=2, axes_dim=[4, 6, 6], theta=10000, qkv_bias=True,
                guidance_embed=True, txt_ids_dims=[], **common,
            )  # fmt: skip
            extra = {"y": torch.randn(1, 24), "guidance": torch.tensor([3.5])}
        else:
            model = WanModel(
                model_type="t2v", dim=72, ffn_dim=96, freq_dim=32, text_dim=40, num_heads=6, num_layers=4, **common
            )
            extra = {}
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        return model.requires_grad_(False).eval(), extra

    def call(family: str, height: int = 10, text: int = 11):
        torch.manual_seed(1)
        latent = torch.randn(1, 16, height, 6) if family == "flux" else torch.randn(1, 16, 2, height, 6)
        return (latent, torch.tensor([0.5]), torch.randn(1, text, 40))

    return make, call


def runner(family: str, model, *, backend: str = "aot_eager", cached: bool = False):
    from comfy.ldm.modules.attention import optimized_attention

    from para_core.attention.choice import Chooser
    from para_core.cache.first_block import FirstBlockCache
    from para_core.execution.compiled import CompiledBlocks
    from para_core.execution.override import OVERRIDE
    from para_core.execution.runner import Runner
    from para_core.plans import flux, wan

    torch._dynamo.reset()
    said.clear()
    found = Runner({"flux": flux.PLAN, "wan": wan.PLAN}[family], model, Chooser(None), cached=False, stock=optimized_attention)
    found.compiled = CompiledBlocks(found.hooks, found.override, OVERRIDE, said.append, backend=backend)
    if cached:
        found.cache = FirstBlockCache(found.hooks)
    return found


def run(found, model, args, extra, mesh=None, **options):
    from para_core.execution.override import OVERRIDE
    from para_core.sequence.solo import SOLO_MESH

    options = {OVERRIDE: found.override, **options}
    names = ["x", "timestep", "context"]
    return found.run(model, names, args, {**extra, "transformer_options": options}, mesh=mesh or SOLO_MESH)


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_compiled_blocks_compute_what_stock_blocks_do_and_leave_the_model_as_it_was(tiny, family):
    make, call = tiny
    model, extra = make(family)
    with torch.inference_mode():
        stock = model(*call(family), **extra, transformer_options={})
        found = runner(family, model)
        compiled = run(found, model, call(family), extra)
        found.remove()
        assert found.compiled.failure is None
        assert (compiled - stock).norm() <= 1e-5 * stock.norm()
        assert torch.equal(model(*call(family), **extra, transformer_options={}), stock)


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_what_changes_from_step_to_step_compiles_nothing_anew(tiny, family):
    make, call = tiny
    model, extra = make(family)
    with torch.inference_mode():
        found = runner(family, model)
        run(found, model, call(family), extra, uuids=["first"], sigmas=torch.ones(1))
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for step in range(3):
            run(found, model, call(family), extra, uuids=[f"step {step}"], sigmas=torch.rand(1), callbacks={step: print})
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
        found.remove()


def test_many_sizes_and_text_lengths_compile_a_bounded_number_of_times(tiny):
    make, call = tiny
    model, extra = make("flux")
    with torch.inference_mode():
        found = runner("flux", model)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for height, text in [(10, 11), (12, 11), (14, 13), (16, 15), (18, 17), (8, 9)]:
            stock = model(*call("flux", height, text), **extra, transformer_options={})
            assert (run(found, model, call("flux", height, text), extra) - stock).norm() <= 1e-5 * stock.norm()
        classes = 2
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 4 * classes
        found.remove()


def test_runs_alone_and_of_several_ranks_have_code_of_their_own_and_find_it_again(tiny, monkeypatch):
    from comfy.ldm.modules.attention import optimized_attention

    from para_core.attention.choice import Chooser
    from para_core.execution import compiled
    from para_core.execution.runner import Runner
    from para_core.plans import flux

    made: list[str] = []

    def inductor(graph, _inputs):
        made.append("alone")
        return graph

    def for_ranks(graph, _inputs):
        made.append("of several")
        return graph

    monkeypatch.setattr(compiled, "inductor", inductor)
    monkeypatch.setattr(compiled, "for_ranks", for_ranks)
    make, call = tiny
    model, extra = make("flux")
    torch._dynamo.reset()
    with torch.inference_mode():
        for shared in (False, True) * 3:
            found = Runner(flux.PLAN, model, Chooser(None), cached=False, compiled=True, stock=optimized_attention, shared=shared)
            run(found, model, call("flux"), extra)
            found.remove()
            assert found.compiled.failure is None
            del found
    assert made == ["alone"] * 2 + ["of several"] * 2, "the classes of blocks, once each"


def test_a_cache_over_compiled_blocks_that_never_hits_changes_nothing(tiny):
    from para_core.cache.first_block import Chunk, Step
    from para_core.execution.override import OVERRIDE
    from para_core.sequence.solo import SOLO_MESH

    make, call = tiny
    model, extra = make("wan")
    with torch.inference_mode():
        found = runner("wan", model)
        plain = run(found, model, call("wan"), extra)
        found.remove()
        found = runner("wan", model, cached=True)
        step = Step(0.5, 0.1, (Chunk("a", 0, 0, 1),), 1, False, False, 0)
        names, options = ["x", "timestep", "context"], {OVERRIDE: found.override}
        cached = found.run(model, names, call("wan"), {"transformer_options": options}, mesh=SOLO_MESH, step=step)
        found.remove()
        assert torch.equal(plain, cached)


def test_a_block_that_cannot_be_compiled_runs_as_it_is_and_that_is_said_once(tiny, monkeypatch):
    make, call = tiny
    model, extra = make("wan")

    def broken(*_args, **_kwargs):
        raise torch._dynamo.exc.Unsupported("no such thing")

    with torch.inference_mode():
        stock = model(*call("wan"), transformer_options={})
        monkeypatch.setattr(torch, "compile", lambda _function, **_options: broken)
        found = runner("wan", model)
        assert torch.equal(run(found, model, call("wan"), extra), stock)
        (sentence,) = said
        assert "could not be compiled" in sentence and "no such thing" in sentence
        found.remove()


def test_what_else_a_block_raises_goes_on_as_it_is_whatever_names_torch_has(tiny, monkeypatch):
    """Out of memory must look like it to ComfyUI, a lost rank like one to the group, and a failed capture to the graphs."""
    make, call = tiny
    model, extra = make("wan")

    def full(*_args, **_kwargs):
        raise torch.OutOfMemoryError("20 GiB")

    monkeypatch.setattr(torch, "compile", lambda _function, **_options: full)
    for name in ("FailOnRecompileLimitHit", "FailOnCacheLimitHit"):
        monkeypatch.delattr(torch._dynamo.exc, name, raising=False)
    with torch.inference_mode():
        found = runner("wan", model)
        with pytest.raises(torch.OutOfMemoryError):
            run(found, model, call("wan"), extra)
        found.remove()
    assert not said


def test_more_kinds_of_input_than_torch_compiles_for_run_as_they_are_and_that_is_said(tiny):
    make, call = tiny
    model, extra = make("wan")
    with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=1):
        found = runner("wan", model)
        run(found, model, call("wan"), extra)
        assert not said
        other = call("wan", height=12, text=5)
        assert torch.equal(run(found, model, other, extra), model(*other, transformer_options={}))
        (sentence,) = said
        assert "no more versions" in sentence and "started again" in sentence
        found.remove()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_compiled_blocks_on_two_ranks_equal_stock(comfy, kind, monkeypatch):
    """FLUX's single blocks compute their MLP beside the exchange."""
    from parity import inprocess

    from para_core.comfy.attach import attach
    from para_core.execution.parallel_mlp import Mlp
    from para_core.settings import Compile, Parallel

    beside, there = [], Mlp.there
    monkeypatch.setattr(Mlp, "there", lambda mlp: (beside.append(mlp), there(mlp)))
    model, job = inprocess.load(kind), inprocess.Job(kind, size=(9, 14) if kind == "flux" else (2, 9, 14))
    stock = inprocess.sample(model, job)
    compiled = inprocess.sample(attach(attach(model, Compile("compile")), Parallel(gpus=2)), job)
    assert inprocess.error(compiled, stock) <= 1e-5 * job.steps
    assert bool(beside) is (kind == "flux")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flux", "wan"])
def test_the_real_compiler_agrees_with_stock(tiny, family):
    make, call = tiny
    model, extra = make(family)
    with torch.inference_mode():
        stock = model(*call(family), **extra, transformer_options={})
        found = runner(family, model, backend="inductor")
        compiled = run(found, model, call(family), extra)
        found.remove()
        assert found.compiled.failure is None
        assert (compiled - stock).norm() <= 1e-5 * stock.norm()
