"""The test environment itself: the real server boots, knows the tiny models and samples with each of them."""

from __future__ import annotations

import re

import pytest
import torch
from env import graphs, models
from env.graphs import Sampling
from env.server import Server

IMPORT_FAILURE = re.compile(r"IMPORT FAILED.*(paradit|nodes_testing)|Error while calling comfy_entrypoint")


def test_server_boots_and_loads_the_pack_without_import_failure(server: Server) -> None:
    assert not IMPORT_FAILURE.search(server.log_text())
    assert server.object_info("KSampler")
    assert server.object_info("TestConditioning")
    assert server.object_info("NoSuchNode") == {}


@pytest.mark.parametrize(
    "graph",
    [
        pytest.param(graphs.flux(decode=True), id="flux"),
        pytest.param(graphs.flux(checkpoint=True, decode=True), id="flux-checkpoint"),
        pytest.param(graphs.wan(), id="wan"),
        pytest.param(graphs.wan_two_models(), id="wan-two-models"),
        pytest.param(graphs.flux_two_passes(), id="flux-two-passes"),
        pytest.param(graphs.flux(sampling=Sampling(cfg=3.0, custom="CFGGuider")), id="flux-cfg-guider"),
        pytest.param(graphs.wan(sampling=Sampling(custom="BasicGuider")), id="wan-basic-guider"),
        pytest.param(graphs.flux(latent_size=(17, 9), batch=2), id="flux-odd-size"),
        pytest.param(graphs.wan(latent_size=(7, 5, 3)), id="wan-odd-size"),
    ],
)
def test_stock_graph_samples_a_finite_latent(server: Server, graph: dict) -> None:
    result = server.run(graph).check()
    latent = result.latent()
    assert latent.dtype == torch.float32
    assert latent.isfinite().all()
    assert 0.1 < latent.std() < 20
    for image in result.images():
        assert image.stat().st_size > 0


def test_every_tensor_of_the_tiny_models_is_recognised(server: Server) -> None:
    for graph in (graphs.flux(decode=True), graphs.flux(checkpoint=True, decode=True), graphs.wan()):
        server.run(graph).check()
    log = server.log_text()
    assert "model_type FLUX" in log
    assert not re.search(r"unet missing|unet unexpected|Missing VAE keys|Leftover VAE keys", log)


@pytest.mark.parametrize("build", [graphs.flux, graphs.wan])
def test_seed_conditioning_and_lora_each_change_the_result(server: Server, build) -> None:
    def latent(**changes) -> torch.Tensor:
        return server.run(build(**changes)).check().latent()

    stock = latent()
    variants = [
        latent(sampling=Sampling(seed=2)),
        latent(sampling=Sampling(positive_tokens=7)),
        latent(sampling=Sampling(cfg=4.0)),
        latent(lora=1.0),
    ]
    for variant in variants:
        change = (variant - stock).norm() / stock.norm()
        assert 0.01 < change < 10
    assert torch.equal(latent(lora=0.0), stock)


def test_failed_prompt_names_the_node_and_the_reason(server: Server) -> None:
    graph = graphs.flux()
    graph["positive"]["inputs"]["width"] = models.FLUX_TEXT_WIDTH + 1
    result = server.run(graph)
    assert result.status == "error"
    assert "KSampler" in result.error


def test_interrupt_ends_a_running_prompt_and_the_next_one_works(server: Server) -> None:
    def interrupt_at_first_step(message: dict) -> None:
        if message["type"] == "progress":
            server.interrupt()

    long = graphs.flux(sampling=Sampling(steps=500, seed=3))
    assert server.run(long, listener=interrupt_at_first_step).status == "interrupted"
    server.run(graphs.flux(sampling=Sampling(seed=3))).check()
