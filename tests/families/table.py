"""The README's table of families, made from the plans and the list of cases.

    python3 tests/env/prepare.py run tests/families/table.py    puts it there
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
BEGIN, END = "<!-- families table -->\n", "<!-- /families table -->"


def table() -> str:
    """The table's text. Builds every tiny model, because its class says which plan it is for."""
    from families.cases import CASES
    from para_core.plans import PLANS, plan_for

    cases: dict[str, list[str]] = {plan.family: [] for plan in PLANS if plan.stacks}
    for name, build in CASES.items():
        plan = plan_for(build()[0])
        assert plan is not None, f"no plan is for the model of {name}"
        cases[plan.family].append(name)
    lines = ["| Family | Tested as | Block lists that are cut | Special |", "| --- | --- | --- | --- |"]
    for family, names in cases.items():
        plans = [plan for plan in PLANS if plan.family == family]
        paths = dict.fromkeys(f"`{spec.path}`" for plan in plans for spec in plan.stacks)
        lines.append(f"| {family} | {', '.join(names)} | {', '.join(paths)} | {plans[0].special} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from env.comfy_import import boot_comfy

    boot_comfy()
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    README.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")
