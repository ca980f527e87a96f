"""The node on the real server: two samplers in one graph, results from ComfyUI's cache, stock samplers."""

from __future__ import annotations

from typing import Any

import numpy as np
from env import graphs
from env.graphs import Sampling, first_block_cache
from env.server import Server
from PIL import Image

from para_core.comfy import wording
from para_core.comfy.chart import CACHED, COMPUTED, SIZE

STEPS = 4


def with_reports(graph: dict[str, Any], *links: tuple[str, str]) -> dict[str, Any]:
    """The graph with a report (name) behind nodes (source)."""
    reports = {name: {"class_type": "ParaReport", "inputs": {"samples": [source, 0]}} for name, source in links}
    return {**graph, **reports}


def words(run: dict[str, Any], maker: str) -> str:
    return wording.text(run, f"KSampler (node {maker})")


def test_each_of_two_samplers_is_reported_also_when_ComfyUI_does_not_run_it_again(server: Server) -> None:
    graph = graphs.flux_two_passes([first_block_cache(0.9)], Sampling(steps=STEPS, seed=77), denoise=0.5)
    before, texts = len(server.reports()), len(server.texts)
    result = server.run(with_reports(graph, ("report", "sampler"), ("report_2", "sampler_2"))).check()
    first, second = server.reports()[before:]
    assert result.text("report") == words(first, "sampler") != result.text("report_2") == words(second, "sampler_2")
    assert first["cached"] > 0 and len(first["timeline"]) == STEPS

    (picture,) = result.history["outputs"]["report"]["images"]
    pixels = np.asarray(Image.open(server.base / "temp" / picture["subfolder"] / picture["filename"]).convert("RGB"))
    assert pixels.shape == (SIZE[1], SIZE[0], 3)
    for colour in (COMPUTED, CACHED):
        assert (np.abs(pixels.astype(int) - colour).max(axis=2) < 16).any()

    shown = server.texts[texts:]
    assert [text for node, text in shown if node == "report"] == [result.text("report")]
    live = [text for node, text in shown if node == "sampler"]
    assert live[0].startswith(f"step 1/{STEPS}, ") and live[-1] == wording.summary(first)

    # another prompt's sampler of the same id runs in between; then a report is added behind what ComfyUI still has
    server.run(graphs.flux([first_block_cache(0.9)], Sampling(steps=2, seed=78), width=96, height=96)).check()
    again = server.run(with_reports(graph, ("report", "sampler"), ("late", "larger"), ("late_2", "sampler_2"))).check()
    runs = server.reports()[before:]
    if "sampler" not in again.executed():  # what ComfyUI keeps between different prompts depends on its cache
        assert len(runs) == 3 and again.text("late") == words(first, "sampler") and again.text("late_2") == words(second, "sampler_2")
    else:
        assert len(runs) == 5 and again.text("late") == words(runs[3], "sampler") and again.text("late_2") == words(runs[4], "sampler_2")
    assert again.text("report") == again.text("late")

    unchanged = server.run(with_reports(graph, ("report", "sampler"), ("later", "sampler_2"))).check()
    assert "sampler" not in unchanged.executed() and "sampler_2" not in unchanged.executed()
    assert len(server.reports()) == before + len(runs), "no sampler ran"
    assert unchanged.text("later") == again.text("late_2") and unchanged.text("report") == again.text("report")


def test_latents_pass_through_and_chart_and_text_can_be_used(server: Server) -> None:
    graph = graphs.flux([first_block_cache(0.9)], Sampling(steps=2, seed=79), width=96, height=96)
    result = server.run(
        {
            **with_reports(graph, ("report", "sampler")),
            "passed": {"class_type": "SaveLatent", "inputs": {"samples": ["report", 0], "filename_prefix": "passed"}},
            "chart": {"class_type": "SaveImage", "inputs": {"images": ["report", 1], "filename_prefix": "chart"}},
            "shown": {"class_type": "PreviewAny", "inputs": {"source": ["report", 2]}},
        }
    ).check()
    assert result.latent("passed").equal(result.latent())
    assert Image.open(result.images("chart")[0]).size == SIZE
    assert result.text("shown") == result.text("report")


def test_a_sampler_without_our_nodes_has_no_report_and_one_that_they_could_not_help_has(server: Server) -> None:
    sampling = Sampling(steps=1, seed=80)
    stock = with_reports(graphs.flux([], sampling, width=96, height=96), ("report", "sampler"))
    alone = with_reports(graphs.flux([graphs.parallel(gpus=1)], sampling, width=96, height=96), ("report", "sampler"))
    nothing, something = (server.run(graph).check() for graph in (stock, alone))
    assert nothing.text("report").startswith("KSampler (node sampler) has no report: no ParaDiT node was on its model")
    assert len(nothing.history["outputs"]["report"]["images"]) == 1
    assert "s a step, 1 step, " in something.text("report") and "Ranks: 1\n" in something.text("report")
    assert something.latent().equal(nothing.latent())
