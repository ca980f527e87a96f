"""The templates: they open whole, with every value in its place, on the ComfyUI they were made for."""

from __future__ import annotations

import json

import pytest
from env import templates
from publishing.checkout import ROOT, nodes

TEMPLATES = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
NODES = nodes()
# Stock definitions from the /object_info of ComfyUI 0.30.0, written by make_workflows.py beside this file.
STOCK = json.loads((ROOT / "tests/publishing/stock_nodes.json").read_text(encoding="utf-8"))
NOTES = {"MarkdownNote", "Note"}
SINGLE = {"ParaParallel", "ParaAttention", "ParaFirstBlockCache"}
FOLDERS = {"checkpoints", "diffusion_models", "text_encoders", "vae"}
UNPUBLISHED = {"cogvideox_5b.safetensors"}  # the note says what to do


def template(name: str) -> dict:
    return json.loads((ROOT / f"workflows/{name}.json").read_text(encoding="utf-8"))


def widgets(type_: str) -> list[str]:
    """Widget names in the order of widgets_values; a seed is followed by what happens to it after a run."""
    if type_ in NODES:
        return NODES[type_].widgets
    found = []
    for entry in STOCK[type_]["inputs"]:
        if entry["widget"]:
            found += [entry["name"], "control after generate"] if entry["seed"] else [entry["name"]]
    return found


def sockets(type_: str) -> dict[str, str]:
    """Input sockets that need a link, with their types."""
    if type_ in NODES:
        return {name: kind.upper() for kind, name in NODES[type_].inputs if name not in NODES[type_].widgets}
    return {entry["name"]: entry["type"] for entry in STOCK[type_]["inputs"] if not entry["widget"] and not entry["optional"]}


def outputs(type_: str) -> list[str]:
    if type_ == "ParaReport":
        return ["LATENT", "IMAGE", "STRING"]
    return ["MODEL"] if type_ in NODES else STOCK[type_]["outputs"]


def shown(name: str) -> set[str]:
    """Our MODEL nodes in a template."""
    return {"ParaAccelerate"} if name.startswith("accelerate_") else SINGLE


def graph_nodes(name: str) -> list[dict]:
    return [node for node in template(name)["nodes"] if node["type"] not in NOTES]


def test_every_template_runs_in_the_tests():
    assert TEMPLATES == sorted(templates.CASES)


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_known_nodes_are_used_and_those_of_ours_that_most_people_want(name):
    types = {node["type"] for node in graph_nodes(name)}
    assert types <= set(NODES) | set(STOCK)
    assert shown(name) == {type_ for type_ in types if type_.startswith("Para")} - {"ParaReport"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_node_has_a_value_for_every_widget(name):
    wrong = [node["type"] for node in graph_nodes(name) if len(node["widgets_values"]) != len(widgets(node["type"]))]
    assert not wrong


@pytest.mark.parametrize("name", TEMPLATES)
def test_values_are_of_the_kind_and_among_the_choices_of_their_widgets(name):
    kinds = {"INT": int, "FLOAT": int | float, "FLOAT,INT": int | float, "STRING": str, "COMBO": str, "BOOLEAN": bool}
    for node in graph_nodes(name):
        values = dict(zip(widgets(node["type"]), node["widgets_values"], strict=True))
        if node["type"] in NODES:
            types = {name: kind.upper() for kind, name in NODES[node["type"]].inputs}
            choices = {}
        else:
            types = {entry["name"]: entry["type"] for entry in STOCK[node["type"]]["inputs"]}
            choices = {entry["name"]: entry["choices"] for entry in STOCK[node["type"]]["inputs"] if entry["choices"]}
        for widget, value in values.items():
            assert isinstance(value, kinds.get(types.get(widget, "STRING"), str)), f"{node['type']}.{widget}: {value!r}"
            assert value in choices.get(widget, [value]), f"{node['type']}.{widget}: {value!r}"


@pytest.mark.parametrize("name", TEMPLATES)
def test_links_and_nodes_agree(name):
    graph = template(name)
    by_id = {node["id"]: node for node in graph["nodes"]}
    assert len(by_id) == len(graph["nodes"]) and graph["last_node_id"] >= max(by_id)
    known = {link[0] for link in graph["links"]}
    assert len(known) == len(graph["links"]) and graph["last_link_id"] >= max(known)
    for link, source, source_slot, target, target_slot, kind in graph["links"]:
        assert link in by_id[source]["outputs"][source_slot]["links"]
        assert by_id[target]["inputs"][target_slot]["link"] == link
        assert outputs(by_id[source]["type"])[source_slot] == kind == by_id[target]["inputs"][target_slot]["type"]
    for node in graph["nodes"]:
        assert {entry["link"] for entry in node["inputs"]} - {None} <= known
        assert {link for entry in node["outputs"] for link in entry["links"]} <= known


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_input_that_needs_a_link_has_one(name):
    for node in graph_nodes(name):
        linked = {entry["name"]: entry["type"] for entry in node["inputs"] if entry["link"] is not None}
        assert linked.items() >= sockets(node["type"]).items(), node["type"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_our_nodes_stand_between_a_stock_loader_and_a_stock_sampler(name):
    graph = template(name)
    by_id = {node["id"]: node for node in graph["nodes"]}
    model = {link[3]: link[1] for link in graph["links"] if link[5] == "MODEL"}
    chain = [next(node["id"] for node in graph["nodes"] if node["type"] in ("KSampler", "CFGGuider"))]
    while chain[-1] in model:
        chain.append(model[chain[-1]])
    types = [by_id[node]["type"] for node in chain]
    assert types[-1] in templates.LOADERS and shown(name) <= set(types)


@pytest.mark.parametrize("name", TEMPLATES)
def test_missing_packs_and_missing_models_can_be_resolved(name):
    for node in graph_nodes(name):
        assert node["properties"]["cnr_id"] == ("paradit" if node["type"] in NODES else "comfy-core")
        files = [value for value in node["widgets_values"] if isinstance(value, str) and value.endswith(".safetensors")]
        models = node["properties"].get("models", [])
        assert [model["name"] for model in models] == [file for file in files if file not in UNPUBLISHED]
        for model in models:
            assert model["url"].startswith("https://huggingface.co/") and model["url"].endswith("/" + model["name"])
            assert model["directory"] in FOLDERS


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_note_says_what_to_load_and_what_to_press(name):
    notes = "".join(node["widgets_values"][0] for node in template(name)["nodes"] if node["type"] in NOTES)
    assert "**Load**" in notes and "**Press**" in notes
    for node in graph_nodes(name):
        assert all(model["url"] in notes for model in node["properties"].get("models", []))
        files = [value for value in node["widgets_values"] if isinstance(value, str) and value.endswith(".safetensors")]
        assert all(file in notes for file in files)
        assert not UNPUBLISHED.intersection(files) or "converted" in notes


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_has_a_thumbnail(name):
    content = (ROOT / f"workflows/{name}.jpg").read_bytes()
    assert content[:2] == b"\xff\xd8" and len(content) < 100_000


@pytest.mark.parametrize("name", TEMPLATES)
def test_nodes_do_not_lie_on_each_other(name):
    boxes = [(*node["pos"], *node["size"], node["type"]) for node in template(name)["nodes"]]
    for index, (x, y, width, height, kind) in enumerate(boxes):
        for other_x, other_y, other_width, other_height, other in boxes[:index]:
            apart = x >= other_x + other_width or other_x >= x + width or y >= other_y + other_height or other_y >= y + height
            assert apart, f"{kind} and {other}"
