"""Compare a ComfyUI tree with the one that the plans were written for, and run the sample of the matrix on it.

    make compat COMFYUI_PATH=/path/to/ComfyUI

Prints a table of what differs (block lists, signatures) and a line a family of the sampled runs; the exit status is not
zero if anything differs or fails. `--record` writes what this tree looks like to COMPAT.json, the reference.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
REFERENCE = HERE / "COMPAT.json"
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]


def sample() -> tuple[dict[str, list[bool]], dict[str, list[str]]]:
    """The sampled runs: of each family which were exact; and what went wrong -> in which runs."""
    import torch

    from matrix.plan import RUNS, SAMPLE
    from matrix.runs import compute
    from matrix.test_matrix import TOLERANCE

    torch.set_num_threads(1)
    exact: dict[str, list[bool]] = {}
    failures: dict[str, list[str]] = {}
    for run in RUNS:
        if run not in SAMPLE:
            continue
        failure = ""
        try:
            if not compute(run).error < TOLERANCE:
                failure = "another result than stock"
        except Exception as problem:  # noqa: BLE001  whatever another tree does is what is asked for
            failure = f"{type(problem).__name__}: {problem}".splitlines()[0]
        exact.setdefault(run.case.split(" ")[0], []).append(not failure)
        if failure:
            failures.setdefault(failure, []).append(str(run))
    return exact, failures


def main(arguments: list[str]) -> int:
    from env import comfy_import

    comfy_import.boot_comfy()
    import comfyui_version

    from matrix.facts import differences, facts, words

    found = facts()
    if arguments == ["--record"]:
        REFERENCE.write_text(json.dumps({"ComfyUI": comfyui_version.__version__, "facts": found}, indent=1) + "\n")
        return 0
    reference = json.loads(REFERENCE.read_text())
    rows = differences(reference["facts"], found)
    print(f"ComfyUI {comfyui_version.__version__} against {reference['ComfyUI']}: {len(rows)} differences in what the plans rely on")
    for name, what, before, now in rows:
        print(f"  {name:<48} {what:<40} {words(before, now)}")
    exact, failures = sample()
    print("sample of the matrix, exact runs:", ", ".join(f"{family} {sum(runs)} of {len(runs)}" for family, runs in exact.items()))
    for failure, runs in failures.items():
        print(f"  {len(runs)} x {failure[:160]}, such as: {runs[0]}")
    return 1 if rows or failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
