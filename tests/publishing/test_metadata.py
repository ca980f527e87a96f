"""The metadata that ComfyUI, its Manager and a first-time reader go by."""

from __future__ import annotations

import re
import tomllib

from publishing.checkout import ROOT, tracked

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
# ComfyUI drops all classifiers of a kind if one of them is not spelled like these
ACCELERATORS = {"GPU :: NVIDIA CUDA", "GPU :: AMD ROCm", "GPU :: Intel Arc", "NPU :: Huawei Ascend", "GPU :: Apple Metal"}
SYSTEMS = {"OS Independent", "POSIX :: Linux", "Microsoft :: Windows", "MacOS"}


def test_the_project_has_what_publishing_needs():
    project = PROJECT["project"]
    assert project["name"] == "paradit"
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["license"] == {"file": "LICENSE"}
    assert project["description"] and project["requires-python"]
    assert {"Repository", "Documentation", "Bug Tracker"} <= set(project["urls"])
    comfy = PROJECT["tool"]["comfy"]
    assert comfy["PublisherId"] and comfy["DisplayName"] == "ParaDiT"
    assert comfy["requires-comfyui"] == ">=0.30.0"


def test_scripts_are_served_once():
    assert "web" not in PROJECT["tool"]["comfy"], "a `web` key beside WEB_DIRECTORY makes ComfyUI load js/ twice"


def test_classifiers_are_spelled_as_comfyui_reads_them():
    classifiers = PROJECT["project"]["classifiers"]
    accelerators = {text.removeprefix("Environment :: ") for text in classifiers if text.startswith("Environment ::")}
    systems = {text.removeprefix("Operating System :: ") for text in classifiers if text.startswith("Operating System ::")}
    assert accelerators and accelerators <= ACCELERATORS
    assert systems and systems <= SYSTEMS
    assert len(accelerators) + len(systems) == len(classifiers)


def test_the_version_is_the_same_everywhere():
    source = (ROOT / "para_core/__init__.py").read_text(encoding="utf-8")
    assert re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)[1] == PROJECT["project"]["version"]


def test_installing_the_pack_never_touches_torch():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = [line for line in lines if line.strip() and not line.startswith("#")] + PROJECT["project"]["dependencies"]
    assert not [line for line in required if re.match(r"(torch\w*|xformers|triton\S*|nvidia\S*|comfy)\b", line)]


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_the_readme_begins_with_one_sentence_and_the_two_commands():
    title, sentence, commands = README.split("\n\n")[:3]
    assert title == "# ParaDiT"
    assert sentence.count(". ") == 0 and sentence.endswith(".")
    assert [line.split("  ")[0] for line in commands.strip("`\n").splitlines()] == ["make demo", "make test"]


def test_the_readme_keeps_the_places_of_its_measured_figures():
    for name in ("demo table", "bench"):
        assert README.index(f"<!-- {name} -->") < README.index(f"<!-- /{name} -->")


def test_the_readme_s_first_figures_are_those_of_the_measured_tables():
    head, _, rest = README.partition("<!-- demo table -->")
    table = rest[rest.index("<!-- bench -->") : rest.index("<!-- /bench -->")]
    figures = re.findall(r"\| (\d\.\d\d) \|", head)
    assert len(figures) > 3 and all(f"` {figure} |" in table for figure in figures)


def test_every_link_of_the_readme_within_the_project_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_every_markdown_table_has_rows_of_one_width():
    wrong = []
    for name in tracked():
        if name.endswith(".md") and not name.startswith("tests/"):
            width = 0
            for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1):
                cells = len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line))) if line.startswith("|") else 0
                if cells and width and cells != width:
                    wrong.append(f"{name}:{number}")
                width = cells
    assert not wrong
