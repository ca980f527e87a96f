"""Which run made a latent: found by the graph, whatever happened to the latent and to ComfyUI's cache of results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

LATENT = torch.arange(24.0).view(1, 2, 3, 4) / 7


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def sampler(latent: str, seed: int = 1, model: str = "model") -> dict[str, Any]:
    return node("KSampler", model=[model, 0], seed=seed, latent_image=[latent, 0])


def report_on(source: str) -> dict[str, Any]:
    return node("ParaReport", samples=[source, 0])


BASE = {"model": node("UNETLoader", unet_name="tiny"), "empty": node("EmptyLatentImage", width=64)}


class Prompts:
    """Executes prompts as ComfyUI's server would, as far as the registry can see."""

    def __init__(self, reports) -> None:
        from comfy_execution.graph import DynamicPrompt

        self.reports, self.make, self.number = reports, DynamicPrompt, 0
        self.begin({})

    def begin(self, graph: dict[str, Any]):
        from comfy_execution.progress import reset_progress_state

        self.number += 1
        self.graph = self.make({**BASE, **graph})
        reset_progress_state(f"prompt{self.number}", self.graph)
        return self.graph

    def at(self, name: str, place: int | None = None):
        from comfy_execution.utils import CurrentNodeContext

        return CurrentNodeContext(f"prompt{self.number}", name, place)

    def sampled(self, name: str, number: int, latents: torch.Tensor = LATENT, place: int | None = None) -> None:
        with self.at(name, place):
            self.reports.keep({"number": number}, self.reports.mark(latents))

    def found(self, name: str = "report", latents: torch.Tensor = LATENT, place: int | None = None) -> list[int]:
        with self.at(name, place):
            return [run.report["number"] for run in self.reports.find(self.graph, name, latents)[0]]

    def why(self, name: str = "report") -> str:
        with self.at(name):
            found, why = self.reports.find(self.graph, name, LATENT)
            assert not found
            return why


@pytest.fixture
def prompts(comfy) -> Iterator[Prompts]:
    from comfy_execution.progress import reset_progress_state

    from para_core.comfy import reports

    kept = list(reports._finished)
    reports._finished.clear()
    one = Prompts(reports)
    yield one
    reports._finished.clear()
    reports._finished.extend(kept)
    reset_progress_state("", one.make({}))


TWO = {
    "first": sampler("empty"),
    "larger": node("LatentUpscaleBy", samples=["first", 0], scale_by=1.5),
    "second": sampler("larger", seed=2),
    "report": report_on("second"),
    "report_first": report_on("first"),
}


def test_each_of_two_samplers_has_its_own_report(prompts):
    prompts.begin(TWO)
    prompts.sampled("first", 1)
    assert prompts.found("report_first") == [1]
    prompts.sampled("second", 2)
    assert (prompts.found(), prompts.found("report_first")) == ([2], [1])


def test_a_run_is_found_through_nodes_that_changed_its_latents(prompts):
    graph = {
        "one": sampler("empty"),
        "picture": node("VAEDecode", samples=["one", 0], vae=["model", 2]),
        "scaled": node("ImageScale", image=["picture", 0], width=96),
        "back": node("VAEEncode", pixels=["scaled", 0], vae=["model", 2]),
        "report": report_on("back"),
    }
    prompts.begin(graph)
    prompts.sampled("one", 1)
    assert prompts.found(latents=torch.zeros(1, 2, 5, 5)) == [1]


def test_a_sampler_from_the_cache_of_results_has_the_run_that_made_them_not_another_workflows_under_the_same_id(prompts):
    prompts.begin({"3": sampler("empty", seed=1)})
    prompts.sampled("3", 1)
    prompts.begin({"3": sampler("empty", seed=2)})
    prompts.sampled("3", 2)
    prompts.begin({"3": sampler("empty", seed=1), "report": report_on("3")})
    assert prompts.found() == [1]


def test_a_change_upstream_makes_another_run(prompts):
    prompts.begin({"3": sampler("empty")})
    prompts.sampled("3", 1)
    prompts.begin({"3": sampler("empty"), "report": report_on("3"), "empty": node("EmptyLatentImage", width=128)})
    assert "KSampler (node 3) has no report" in prompts.why()
    prompts.sampled("3", 2)
    assert prompts.found() == [2]


def test_equal_samplers_under_other_ids_share_what_ComfyUI_shares(prompts):
    prompts.begin({"3": sampler("empty"), "4": sampler("empty"), "report": report_on("4")})
    prompts.sampled("3", 1)
    assert prompts.found() == [1]
    prompts.sampled("4", 2)  # with --cache-none both run
    assert prompts.found() == [2]
    prompts.begin({"30": sampler("other"), "other": BASE["empty"], "report": report_on("30")})
    assert prompts.found() == [2]


def test_the_same_node_run_again_is_reported_anew(prompts):
    for number in (1, 2):
        prompts.begin({"3": sampler("empty"), "report": report_on("3")})
        prompts.sampled("3", number)
        assert prompts.found() == [number]


def test_of_several_runs_of_one_node_the_one_with_these_latents_is_taken_else_the_last(prompts):
    prompts.begin({"3": sampler("empty"), "report": report_on("3")})
    for number in (1, 2, 3):
        prompts.sampled("3", number, LATENT + number)
    assert prompts.found(latents=LATENT + 2) == [2]
    assert prompts.found(latents=(LATENT + 1).half()) == [1], "ComfyUI may keep results in a narrower dtype"
    assert prompts.found(latents=LATENT) == [3]


def test_each_entry_of_a_list_has_its_own_run(prompts):
    prompts.begin({"3": sampler("empty"), "report": report_on("3")})
    for place in range(3):
        prompts.sampled("3", place, LATENT, place)
    assert [prompts.found(place=place) for place in range(3)] == [[0], [1], [2]]


def test_a_sampler_inside_an_expanded_node_is_found_within_and_after_its_prompt(prompts):
    outer = {"5": node("Group", model=["model", 0], latent_image=["empty", 0]), "report": report_on("5")}
    graph = prompts.begin(outer)
    graph.add_ephemeral_node("5.0.0.1", node("KSampler", model=["model", 0], latent_image=["empty", 0], extra=object()), "5", "5")
    graph.add_ephemeral_node("5.0.0.2", report_on("5.0.0.1"), "5", "5")
    prompts.sampled("5.0.0.1", 1)
    assert prompts.found("5.0.0.2") == [1]
    assert prompts.found() == [1]
    prompts.begin(outer)
    assert prompts.found() == [1]


def test_ids_of_subgraphs_are_ids_like_any(prompts):
    prompts.begin({"12:3": sampler("empty"), "12:7": node("LatentFlip", samples=["12:3", 0]), "report": report_on("12:7")})
    prompts.sampled("12:3", 1)
    assert prompts.found() == [1]


def test_joined_latents_have_the_runs_of_both_samplers(prompts):
    graph = {
        "a": sampler("empty", 1),
        "b": sampler("empty", 2),
        "join": node("LatentComposite", samples_to=["a", 0], samples_from=["b", 0]),
        "report": report_on("join"),
    }
    prompts.begin(graph)
    prompts.sampled("a", 1)
    prompts.sampled("b", 2)
    assert prompts.found() == [1, 2]


def test_a_stock_sampler_in_between_is_named_instead_of_the_one_before_it(prompts):
    prompts.begin(TWO)
    prompts.sampled("first", 1)
    prompts.graph.get_node("second")["_meta"] = {"title": "Second pass"}
    assert prompts.why().startswith("Second pass (node second) has no report: no ParaDiT node was on its model")


def test_latents_that_no_sampler_made_are_said_to_be_such(prompts):
    prompts.begin({"report": report_on("empty")})
    assert prompts.why().startswith("No sampler was found before this node.")
    prompts.begin({"report": node("ParaReport")})
    assert prompts.why().startswith("No sampler was found before this node.")


def test_nested_latents_are_known_by_what_ComfyUI_samples_them_as(prompts):
    import comfy.nested_tensor
    import comfy.utils

    parts = [torch.randn(2, 3, 5, 4, 4), torch.randn(2, 1, 9, 7)]
    packed, _ = comfy.utils.pack_latents(parts)
    assert prompts.reports.mark(packed).of(comfy.nested_tensor.NestedTensor(parts))
    assert not prompts.reports.mark(packed + 1).of(comfy.nested_tensor.NestedTensor(parts))


def test_the_registry_is_bounded_and_scripts_leave_nothing_in_it(prompts):
    prompts.reports.keep({"number": 0}, prompts.reports.mark(LATENT))  # no node is executing
    assert not prompts.reports._finished
    prompts.begin({"3": sampler("empty")})
    for number in range(prompts.reports.LIMIT + 5):
        prompts.sampled("3", number)
    assert [run.report["number"] for run in prompts.reports._finished] == list(range(5, prompts.reports.LIMIT + 5))


def test_graphs_unrolled_from_long_loops_are_walked(prompts):
    graph = {"0": sampler("empty")}
    for index in range(1, 3000):
        graph[str(index)] = node("LatentBlend", samples1=[str(index - 1), 0], samples2=[str(max(0, index - 2)), 0])
    prompts.begin({**graph, "report": report_on("2999")})
    prompts.sampled("0", 1)
    assert prompts.found() == [1]
