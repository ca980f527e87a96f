"""What the README says of the families is what the plans and the cases hold; plans stay small."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from para_core.plans import PLANS

from .table import BEGIN, END, README, ROOT, table

PLAN_FILES = sorted(path for path in (ROOT / "para_core/plans").glob("*.py") if path.stem not in ("__init__", "plan", "rules"))


def test_readme_has_the_table_of_families(comfy: None) -> None:
    found, expected = README.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0], table()
    assert found == expected, "run tests/families/table.py"
    assert "|  |" not in expected, "a family without a case, or a plan that does not say what is special"


def test_a_class_belongs_to_one_plan() -> None:
    models = [name for plan in PLANS for name in plan.models]
    assert len(models) == len(set(models)) and all("." in name for name in models)


@pytest.mark.parametrize("path", PLAN_FILES, ids=lambda path: path.stem)
def test_a_plan_is_short_or_says_why_it_is_not(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    assert len(lines) <= 60 or "longer than 60 lines because" in (ast.get_docstring(ast.parse(text)) or "")
