"""Whole runs over processes with nodes of others before ours: the same latents as without ours, shared by all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from parity.inprocess import Job, error, load, run, sample

from para_core.settings import Cache, Parallel

from . import codes, rows

pytestmark = pytest.mark.usefixtures("comfy")
TOLERANCE = 1e-5  # relative, per forward, float32

FLUX = Job(cfg=4.0)
WAN = Job("wan", (3, 6, 10), cfg=4.0)
Node = Callable[[Any], Any]


def node(module: str, name: str, *values: Any) -> Node:
    """A core node of today's form, on a model."""

    def apply(model: Any) -> Any:
        import importlib

        return getattr(importlib.import_module(f"comfy_extras.{module}"), name).execute(model, *values).args[0]

    return apply


def older(name: str, method: str, *values: Any) -> Node:
    """A node of nodes_model_advanced."""

    def apply(model: Any) -> Any:
        from comfy_extras import nodes_model_advanced

        return getattr(getattr(nodes_model_advanced, name)(), method)(model, *values)[0]

    return apply


def options(make: Callable[[], codes.Options]) -> Node:
    def apply(model: Any) -> Any:
        model = model.clone()
        model.model_options["transformer_options"].update(make())
        return model

    return apply


def compiled(*keys: str) -> Node:
    """What TorchCompileModel does, with a backend that needs no compiler; with keys as block-wise nodes of packs do it."""

    def apply(model: Any) -> Any:
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        model = model.clone()
        set_torch_compile_wrapper(model, "eager", keys=list(keys))
        return model

    return apply


def both(*nodes: Node) -> Node:
    def apply(model: Any) -> Any:
        for each in nodes:
            model = each(model)
        return model

    return apply


NAG = node("nodes_nag", "NAGuidance", 5.0, 0.5, 1.5)
FLUX_BLOCKS = [f"diffusion_model.{kind}_blocks.{index}" for kind, count in (("double", 2), ("single", 4)) for index in range(count)]
TOGETHER = "Tokens are brought to the first GPU at every call of"
ALONE = "Attention is computed on the first GPU alone"
UNCOMPILED = "What Torch Compile Model compiles runs uncompiled here"

# the node, what is sampled, how it is split, degrees of the widest forward, how the sentences begin that are said
CASES: dict[str, tuple[Node, Job, Parallel, list[int], tuple[str, ...]]] = {
    "nag": (NAG, FLUX, Parallel(2), [1, 1, 2], (TOGETHER,)),
    "nag, batch degree asked for": (NAG, FLUX, Parallel(2, batch_degree=2), [1, 1, 2], (TOGETHER, "The batch is not split")),
    "nag on 3": (NAG, FLUX, Parallel(3), [1, 1, 3], (TOGETHER,)),
    "attention of wan": (options(rows.patch("attn1_patch", codes.wan_attention)), WAN, Parallel(2, ring_degree=2), [1, 2, 1], (TOGETHER,)),
    "new text": (options(rows.patch("post_input", codes.new_text)), FLUX, Parallel(2), [1, 1, 2], (TOGETHER,)),
    "between blocks of wan": (options(rows.patch("double_block", codes.between)), WAN, Parallel(2), [1, 1, 2], (TOGETHER,)),
    "skip layers": (node("nodes_slg", "SkipLayerGuidanceDiT", 3.0, 0.0, 1.0, "1", "0, 2"), FLUX, Parallel(2), [2, 1, 1], (TOGETHER,)),
    "skip the last block": (node("nodes_slg", "SkipLayerGuidanceDiT", 3.0, 0.0, 1.0, "3"), WAN, Parallel(2), [2, 1, 1], (TOGETHER,)),
    "skip for the negative prompt": (
        node("nodes_slg", "SkipLayerGuidanceDiTSimple", 0.0, 1.0, "0", "3"),
        FLUX,
        Parallel(2),
        [1, 1, 2],
        (TOGETHER,),
    ),
    "skip on 3": (
        node("nodes_slg", "SkipLayerGuidanceDiT", 3.0, 0.0, 1.0, "0, 1", "3"),
        FLUX,
        Parallel(3, batch_degree=1),
        [1, 1, 3],
        (TOGETHER,),
    ),
    "blocks run twice": (options(lambda: codes.replaced(codes.twice, 0, 1)), FLUX, Parallel(2), [1, 1, 2], (TOGETHER,)),
    "override": (options(lambda: {codes.OVERRIDE: codes.override}), FLUX, Parallel(2), [1, 1, 2], (ALONE,)),
    "override on wan": (options(lambda: {codes.OVERRIDE: codes.override}), WAN, Parallel(2), [1, 1, 2], (ALONE,)),
    "override on 3": (options(lambda: {codes.OVERRIDE: codes.override}), FLUX, Parallel(3), [1, 1, 3], (ALONE,)),
    "easycache": (node("nodes_easycache", "EasyCacheNode", 0.2, 0.0, 1.0, False), FLUX.but(steps=6), Parallel(2), [2, 1, 1], ()),
    "easycache, prompts of two lengths": (
        node("nodes_easycache", "EasyCacheNode", 0.2, 0.0, 1.0, False),
        FLUX.but(steps=6, tokens=(11, 7)),
        Parallel(2),
        [2, 1, 1],
        (),
    ),
    "easycache that skips all it may": (
        node("nodes_easycache", "EasyCacheNode", 3.0, 0.0, 1.0, False),
        WAN.but(steps=5),
        Parallel(2, batch_degree=1),
        [1, 1, 2],
        (),
    ),
    "lazycache": (node("nodes_easycache", "LazyCacheNode", 0.2, 0.0, 1.0, False), FLUX.but(steps=5), Parallel(2), [2, 1, 1], ()),
    "torch.compile of the model": (compiled("diffusion_model"), FLUX, Parallel(2), [2, 1, 1], (UNCOMPILED,)),
    "torch.compile of blocks, prompts of two lengths": (
        compiled(*FLUX_BLOCKS),
        FLUX.but(tokens=(11, 7)),
        Parallel(2),
        [1, 1, 2],  # no two calls at once under a wrapper that replaces modules
        (UNCOMPILED,),
    ),
    "sampling of flux": (older("ModelSamplingFlux", "patch", 1.5, 0.2, 640, 320), FLUX, Parallel(2), [2, 1, 1], ()),
    "sampling of wan": (older("ModelSamplingSD3", "patch", 5.0), WAN, Parallel(2), [2, 1, 1], ()),
    "rescaled cfg": (older("RescaleCFG", "patch", 0.7), FLUX, Parallel(2), [2, 1, 1], ()),
    "functions before and after cfg": (
        both(node("nodes_apg", "APG", 0.5, 2.0, 0.3), node("nodes_cfg", "CFGZeroStar"), node("nodes_cfg", "CFGNorm", 0.8)),
        FLUX,
        Parallel(2),
        [2, 1, 1],
        (),
    ),
}
CHANGES_NOTHING = tuple(name for name in CASES if name.startswith("torch.compile"))


@pytest.mark.parametrize("ranks, name", [(case[2].gpus, name) for name, case in CASES.items()])
def test_run_with_nodes_of_others_equals_stock(ranks: int, name: str) -> None:
    apply, job, parallel, degrees, sentences = CASES[name]
    model = apply(load(job.kind))
    expected = sample(model, job)
    result, report = run(model, job, parallel)
    assert report["degrees"] == degrees
    assert [note for note in report["notes"] if not note.startswith(sentences)] == [] and len(report["notes"]) == len(sentences)
    assert error(result, expected) < TOLERANCE * 2 * job.steps
    if name not in CHANGES_NOTHING:
        assert error(sample(load(job.kind), job), expected) > 1e-3, "the node changes something"


# -- with the First Block Cache ---------------------------------------------------------------------------------------

UNSEEN = "First Block Cache does not skip anything with"


def test_steps_of_a_model_that_another_node_compiles_are_foretold_like_those_of_others() -> None:
    job, cache = FLUX.but(steps=8), Cache(3.0, rule="forecast")
    expected, alone = run(load(job.kind), job, cache)
    result, report = run(compiled("diffusion_model")(load(job.kind)), job, cache)
    assert report["cached"] == alone["cached"] > 0 and error(result, expected) < TOLERANCE * job.steps
    (note,) = report["notes"]
    assert note.startswith(UNCOMPILED)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["nag", "skip layers", "between blocks of wan", "blocks run twice", "override on wan"])
def test_cache_follows_code_that_it_can_judge_and_says_so_of_the_rest(name: str, ranks: int) -> None:
    apply, job, _, _, _ = CASES[name]
    model, job = apply(load(job.kind)), job.but(steps=5)
    expected = sample(model, job)
    result, report = run(model, job, Parallel(ranks), Cache(threshold=1e-9))
    assert report["ranks"] == ranks and report["cached"] == 0
    assert error(result, expected) < TOLERANCE * 2 * job.steps
    result, report = run(model, job, Parallel(ranks), Cache(threshold=1e9))
    judged = name in ("nag", "skip layers", "override on wan")
    assert bool(report["cached"]) == judged and any(note.startswith(UNSEEN) for note in report["notes"]) != judged
    if judged:
        one, _ = run(model, job, Parallel(1), Cache(threshold=1e9))
        assert error(result, one) < TOLERANCE * 2 * job.steps, "the same hits on one rank"
    else:
        assert error(result, expected) < TOLERANCE * 2 * job.steps
