"""What graphs depend on (ids, inputs, their order), and a help page for every node."""

from __future__ import annotations

import re

import pytest
from publishing.checkout import ROOT, nodes

NODES = nodes()


def test_the_nodes_of_this_release_are_registered_with_their_inputs_in_the_order_graphs_depend_on():
    expected = {
        "ParaAccelerate": ["model", "gpus", "attention", "cache", "compile"],
        "ParaParallel": ["model", "gpus", "batch_degree", "ulysses_degree", "ring_degree", "devices"],
        "ParaAttention": ["model", "backend"],
        "ParaCompile": ["model", "mode"],
        "ParaFirstBlockCache": ["model", "threshold", "start_percent", "end_percent", "max_consecutive_hits", "predictor", "rule"],
        "ParaReport": ["samples"],
    }
    assert {node.id: [name for _, name in node.inputs] for node in NODES.values()} == expected


def test_every_input_has_a_tooltip():
    assert not [(node.id, name) for node in NODES.values() for _, name in node.inputs if name not in node.tooltips]


def test_nodes_are_found_under_one_category():
    assert {node.category for node in NODES.values()} == {"ParaDiT"}


def help_page(node_id: str) -> str:
    return (ROOT / f"js/docs/{node_id}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("node_id", NODES)
def test_a_help_page_lists_exactly_the_inputs_of_its_node_in_order(node_id):
    section = help_page(node_id).partition("## Inputs")[2].partition("## Outputs")[0]
    table = section.partition("\n\n|")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == [name for _, name in NODES[node_id].inputs]


@pytest.mark.parametrize("node_id", NODES)
def test_a_help_page_has_every_section_under_the_display_name(node_id):
    page = help_page(node_id)
    assert page.startswith(f"# {NODES[node_id].display_name}\n\n")
    assert re.findall(r"^## (.+)$", page, re.MULTILINE) == ["Inputs", "Outputs", "Notes", "When not to use it"]


def test_there_is_no_help_page_without_a_node():
    assert {path.stem for path in (ROOT / "js/docs").glob("*.md")} == set(NODES)


@pytest.mark.parametrize("node_id", NODES)
def test_the_readme_lists_every_node_with_its_help_page(node_id):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"| [{NODES[node_id].display_name}](js/docs/{node_id}.md) (`{node_id}`) |" in readme
