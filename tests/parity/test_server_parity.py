"""Through the real server, with latents saved by the stock SaveLatent: accelerated graphs give what stock graphs give.

Every case also reads the run lines in the server's log, so that a run that quietly stayed on one rank fails.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from env import graphs
from env.graphs import Patch, Sampling, first_block_cache, parallel
from env.server import Graph, Server
from parity.inprocess import error

TOLERANCE = 1e-5  # relative, per forward, float32
NEVER = first_block_cache(threshold=1e-6)
EQUAL = Sampling(steps=2, cfg=5.0, positive_tokens=11, negative_tokens=11)  # conditions that share a batch
UNEQUAL = Sampling(steps=2, cfg=5.0, positive_tokens=11, negative_tokens=7)  # conditions that ComfyUI runs one by one
PLAIN = Sampling(steps=2, positive_tokens=11)
ODD = {"latent_size": (17, 9)}  # 9 x 5 tokens
ODD_VIDEO = {"latent_size": (7, 5, 3)}  # 3 x 3 x 4 tokens

Expected = tuple[list[int], int]  # [batch, ring, ulysses] of a sampling run, and its forwards


@dataclass(frozen=True)
class Case:
    """A stock graph, what is put into it, and what each of its sampling runs must have done."""

    build: Callable[..., Graph]
    sampling: Sampling
    split: Patch
    expected: list[Expected]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return self.split[1]["gpus"]


CASES: dict[str, Case] = {
    # two ranks
    "flux_ulysses": Case(graphs.flux, PLAIN, parallel(2), [([1, 1, 2], 2)], ODD),
    "flux_ring_batch_of_3": Case(graphs.flux, PLAIN, parallel(2, batch=1, ring=2), [([1, 2, 1], 2)], {**ODD, "batch": 3}),
    "flux_cfg_equal_texts": Case(graphs.flux, EQUAL, parallel(2), [([2, 1, 1], 2)], ODD),
    "flux_cfg_unequal_texts": Case(graphs.flux, UNEQUAL, parallel(2), [([2, 1, 1], 4)], ODD),
    "flux_cfg_unequal_texts_uncut_batch": Case(graphs.flux, UNEQUAL, parallel(2, batch=1), [([1, 1, 2], 4)], ODD),
    "flux_images_of_a_batch": Case(graphs.flux, PLAIN, parallel(2), [([2, 1, 1], 2)], {**ODD, "batch": 3}),
    "flux_basic_guider": Case(graphs.flux, Sampling(steps=2, custom="BasicGuider"), parallel(2), [([1, 1, 2], 2)], ODD),
    "flux_cfg_guider": Case(graphs.flux, Sampling(steps=2, cfg=5.0, custom="CFGGuider", negative_tokens=7), parallel(2), [([2, 1, 1], 4)]),
    "flux_lora": Case(graphs.flux, PLAIN, parallel(2), [([1, 1, 2], 2)], {**ODD, "lora": 0.8}),
    "flux_checkpoint_of_one_head": Case(graphs.flux, PLAIN, parallel(2), [([1, 2, 1], 2)], {**ODD, "checkpoint": True}),
    "flux_two_passes": Case(graphs.flux_two_passes, PLAIN, parallel(2), [([1, 1, 2], 2), ([1, 1, 2], 2)]),
    "wan_ulysses": Case(graphs.wan, PLAIN, parallel(2), [([1, 1, 2], 2)], ODD_VIDEO),
    "wan_ring_cfg": Case(graphs.wan, EQUAL, parallel(2, batch=1, ring=2), [([1, 2, 1], 2)], ODD_VIDEO),
    "wan_cfg_unequal_texts_batch_of_2": Case(graphs.wan, UNEQUAL, parallel(2), [([2, 1, 1], 4)], {**ODD_VIDEO, "batch": 2}),
    "wan_lora": Case(graphs.wan, PLAIN, parallel(2), [([1, 1, 2], 2)], {**ODD_VIDEO, "lora": 0.8}),
    "wan_two_models": Case(graphs.wan_two_models, Sampling(cfg=5.0), parallel(2), [([2, 1, 1], 2), ([2, 1, 1], 2)]),
    "wan_two_models_of_unequal_heads": Case(graphs.wan_two_models, Sampling(), parallel(2), [([1, 1, 2], 2), ([1, 2, 1], 2)]),
    # three ranks
    "flux_ulysses_of_3": Case(graphs.flux, EQUAL, parallel(3), [([1, 1, 3], 2)], ODD),
    "flux_ring_of_3_batch_of_2": Case(graphs.flux, PLAIN, parallel(3, ring=3), [([1, 3, 1], 2)], {**ODD, "batch": 2}),
    "flux_images_over_3": Case(graphs.flux, PLAIN, parallel(3), [([3, 1, 1], 2)], {**ODD, "batch": 3}),
    "flux_two_of_3_ranks": Case(graphs.flux, UNEQUAL, parallel(3, batch=2), [([2, 1, 1], 4)], ODD),
    "wan_ulysses_of_3_batch_of_2": Case(graphs.wan, PLAIN, parallel(3), [([1, 1, 3], 2)], {**ODD_VIDEO, "batch": 2}),
    "wan_ring_of_3": Case(graphs.wan, UNEQUAL, parallel(3, ring=3), [([1, 3, 1], 4)], ODD_VIDEO),
    # four ranks
    "flux_unified": Case(graphs.flux, PLAIN, parallel(4, ring=2, ulysses=2), [([1, 2, 2], 2)], ODD),
    "flux_unified_chosen": Case(graphs.flux, UNEQUAL, parallel(4, batch=1), [([1, 2, 2], 4)], {**ODD, "batch": 2}),
    "flux_batch_and_ulysses": Case(graphs.flux, EQUAL, parallel(4), [([2, 1, 2], 2)], ODD),
    "flux_lanes_and_ulysses": Case(graphs.flux, UNEQUAL, parallel(4), [([2, 1, 2], 4)], ODD),
    "flux_checkpoint_over_4": Case(graphs.flux, EQUAL, parallel(4), [([2, 2, 1], 2)], {**ODD, "checkpoint": True}),
    "wan_unified": Case(graphs.wan, PLAIN, parallel(4, ring=2, ulysses=2), [([1, 2, 2], 2)], ODD_VIDEO),
    "wan_lanes_and_ring": Case(graphs.wan, UNEQUAL, parallel(4, ring=2), [([2, 2, 1], 4)], ODD_VIDEO),
    "wan_rows_over_4": Case(graphs.wan, EQUAL, parallel(4), [([4, 1, 1], 2)], {**ODD_VIDEO, "batch": 3}),
    "wan_two_models_over_4": Case(graphs.wan_two_models, Sampling(cfg=5.0), parallel(4), [([2, 1, 2], 2), ([2, 2, 1], 2)]),
}


def latent(server: Server, graph: Graph, cache: dict[str, torch.Tensor] = {}) -> torch.Tensor:  # noqa: B006 - kept on purpose
    """What a stock graph gives; each is run once."""
    key = f"{server.port} {json.dumps(graph, sort_keys=True)}"
    if key not in cache:
        cache[key] = server.run(graph).check().latent()
    return cache[key]


def accelerated(server: Server, graph: Graph) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """What an accelerated graph gives, and the lines of its sampling runs."""
    before = len(server.reports())
    result = server.run(graph).check()
    return result.latent(), server.reports()[before:]


@pytest.mark.parametrize("ranks, name", [(case.ranks, name) for name, case in CASES.items()])
def test_accelerated_graph_equals_stock(server: Server, ranks: int, name: str) -> None:
    case = CASES[name]
    expected = latent(server, case.build(sampling=case.sampling, **case.options))
    result, runs = accelerated(server, case.build([case.split], case.sampling, **case.options))
    assert [(run["degrees"], run["forwards"]) for run in runs] == case.expected
    assert all(run["notes"] == [] and run["cached"] == 0 for run in runs)
    forwards = sum(run["forwards"] for run in runs)
    assert error(result, expected) < TOLERANCE * forwards


ONE_RANK = {
    "one_rank": (graphs.flux, ODD, [parallel(1)], False),
    "cache_off": (graphs.flux, ODD, [parallel(1), first_block_cache(threshold=0.0)], False),
    "never_hit": (graphs.flux, {**ODD, "batch": 2}, [NEVER], True),
    "one_rank_never_hit": (graphs.flux, ODD, [NEVER, parallel(1)], True),
    "lora": (graphs.flux, {**ODD, "lora": 0.8}, [NEVER, parallel(1)], True),
    "checkpoint": (graphs.flux, {**ODD, "checkpoint": True}, [NEVER, parallel(1)], True),
    "wan": (graphs.wan, ODD_VIDEO, [NEVER, parallel(1)], True),
    "wan_two_models": (graphs.wan_two_models, {}, [NEVER, parallel(1)], True),
}


@pytest.mark.parametrize("name", ONE_RANK)
def test_one_rank_and_a_cache_that_never_hits_are_bit_identical(server: Server, name: str) -> None:
    build, options, patches, hooked = ONE_RANK[name]
    sampling = Sampling(steps=3, cfg=5.0)
    expected = latent(server, build(sampling=sampling, **options))
    result, runs = accelerated(server, build(patches, sampling, **options))
    assert torch.equal(result, expected)
    assert bool(runs) == hooked
    for run in runs:
        assert run["ranks"] == 1 and run["cached"] == 0 and len(run["changes"]) == run["forwards"] > 0


@pytest.mark.parametrize("ranks", [2])
def test_several_prompts_queued_at_once_each_give_their_own_result(server: Server, ranks: int) -> None:
    wanted = [
        (graphs.flux, {"sampling": Sampling(steps=2, seed=1), **ODD}),
        (graphs.wan, {"sampling": Sampling(steps=2, seed=1), **ODD_VIDEO}),
        (graphs.flux, {"sampling": Sampling(steps=2, seed=2, cfg=5.0), **ODD}),
        (graphs.flux, {"sampling": Sampling(steps=2, seed=2), **ODD, "batch": 2}),
        (graphs.wan, {"sampling": Sampling(steps=2, seed=3), **ODD_VIDEO, "lora": 0.8}),
    ]
    expected = [latent(server, build(**options)) for build, options in wanted]
    before = len(server.reports())
    prompts = [server.queue(build([parallel(ranks)], **options)) for build, options in wanted]
    results = [server.wait(prompt).check().latent() for prompt in prompts]
    assert [run["ranks"] for run in server.reports()[before:]] == [ranks] * len(wanted)
    for result, stock in zip(results, expected, strict=True):
        assert error(result, stock) < 2 * TOLERANCE


@pytest.mark.parametrize("ranks", [2])
def test_order_of_nodes_does_not_matter_and_bypassing_them_leaves_nothing(server: Server, ranks: int) -> None:
    sampling, nodes = Sampling(steps=2, cfg=5.0), [parallel(ranks), NEVER, graphs.attention("exact")]
    stock = latent(server, graphs.flux(sampling=sampling, **ODD))
    results = []
    for patches in (nodes, nodes[::-1], [nodes[1], nodes[0], nodes[2]]):
        result, (run,) = accelerated(server, graphs.flux(patches, sampling, **ODD))
        assert run["ranks"] == ranks and len(run["changes"]) == 2
        results.append(result)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert error(results[0], stock) < 2 * TOLERANCE
    assert torch.equal(server.run(graphs.flux(sampling=sampling, **ODD)).check().latent(), stock)


@pytest.mark.parametrize("ranks", [2])
def test_lora_strength_changed_between_prompts_changes_the_result_as_stock_does(server: Server, ranks: int) -> None:
    results = {}
    for strength in (0.5, 1.0, 0.5):
        stock = latent(server, graphs.flux(sampling=PLAIN, lora=strength, **ODD))
        results[strength], (run,) = accelerated(server, graphs.flux([parallel(ranks)], PLAIN, lora=strength, **ODD))
        assert run["ranks"] == ranks and error(results[strength], stock) < 2 * TOLERANCE
    assert error(results[0.5], results[1.0]) > 1e-3


@pytest.mark.parametrize("ranks", [2])
def test_lora_after_our_nodes_counts_too(server: Server, ranks: int) -> None:
    stock = latent(server, graphs.flux(sampling=PLAIN, lora=0.8, **ODD))
    lora = ("LoraLoaderModelOnly", {"lora_name": graphs.models.FLUX_LORA_FILE, "strength_model": 0.8})
    result, (run,) = accelerated(server, graphs.flux([parallel(ranks), lora], PLAIN, **ODD))
    assert run["ranks"] == ranks and error(result, stock) < 2 * TOLERANCE


@pytest.mark.parametrize(
    "ranks, sampling, patches, degrees",
    [
        (1, UNEQUAL, [NEVER], [1, 1, 1]),
        (2, PLAIN, [parallel(2)], [1, 1, 2]),
        (2, UNEQUAL, [parallel(2), NEVER], [2, 1, 1]),
    ],
    ids=["cache", "tokens", "prompts_and_cache"],
)
def test_a_controlnet_steers_an_accelerated_graph_as_it_steers_stock(server: Server, ranks: int, sampling, patches, degrees) -> None:
    size = {"width": 144, "height": 80}  # 9 x 5 tokens
    free, stock = (latent(server, graphs.flux(sampling=sampling, control=control, **size)) for control in (0.0, 0.7))
    result, (run,) = accelerated(server, graphs.flux(patches, sampling, control=0.7, **size))
    assert error(stock, free) > 0.01 and run["notes"] == [] and run["degrees"] == degrees and run["cached"] == 0
    assert torch.equal(result, stock) if ranks == 1 else error(result, stock) < TOLERANCE * run["forwards"]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(
    "sampling", [PLAIN, EQUAL, UNEQUAL, Sampling(steps=3, cfg=5.0, sampler="heun")], ids=["plain", "equal", "unequal", "heun"]
)
@pytest.mark.parametrize("build, options", [(graphs.flux, ODD), (graphs.wan, ODD_VIDEO)], ids=["flux", "wan"])
@pytest.mark.parametrize(
    "ranks, split",
    [
        (2, parallel(2)),
        (2, parallel(2, batch=1, ring=2)),
        (3, parallel(3)),
        (3, parallel(3, ring=3)),
        (4, parallel(4)),
        (4, parallel(4, ring=2, ulysses=2)),
        (4, parallel(4, batch=1, ring=4)),
        (6, parallel(6)),
    ],
    ids=["2", "2_ring", "3", "3_ring", "4", "4_unified", "4_ring", "6"],
)
def test_every_split_of_every_kind_of_batch_equals_stock(server: Server, ranks: int, split: Patch, build, options, sampling, batch) -> None:
    expected = latent(server, build(sampling=sampling, batch=batch, **options))
    result, (run,) = accelerated(server, build([split], sampling, batch=batch, **options))
    assert run["ranks"] > 1 and run["notes"] == []
    assert error(result, expected) < TOLERANCE * run["forwards"]
