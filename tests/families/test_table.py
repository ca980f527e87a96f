"""What the README says of the families is what the plans and the cases hold; plans stay small."""

from __future__ import annotations

import ast

import pytest

from para_core.plans import PLANS, plan_for

from .cases import CASES
from .table import BEGIN, END, ROOT, ROWS, of, table

PLAN_FILES = sorted(
    path for path in (ROOT / "para_core/plans").glob("*.py") if path.stem not in ("__init__", "plan", "rules")
)


def test_readme_has_the_table_of_families() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.partition(BEGIN)[2].partition(END)[0].strip() == table(), "run tests/families/table.py and put its text there"


def test_every_plan_that_cuts_has_a_row_and_every_case_stands_in_one() -> None:
    assert {plan.family for plan in PLANS if plan.stacks} == set(ROWS)
    listed = [f"{words} {rest}".strip() for family in ROWS for words, others in of(family, list(CASES)).items() for rest in ("", *others)]
    assert sorted(listed) == sorted(CASES)


@pytest.mark.parametrize("family", ROWS)
def test_cases_stand_in_the_row_of_their_plan(comfy: None, family: str) -> None:
    for words, others in of(family, list(CASES)).items():
        model, _ = CASES[f"{words} {others[-1]}" if others else words]()
        plan = plan_for(model)
        assert plan is not None and plan.family == family


@pytest.mark.parametrize("path", PLAN_FILES, ids=lambda path: path.stem)
def test_a_plan_is_short_or_says_why_it_is_not(path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    assert len(lines) <= 60 or "longer than 60 lines because" in (ast.get_docstring(ast.parse(text)) or "")
