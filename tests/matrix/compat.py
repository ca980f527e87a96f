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


def sample() -> dict[str, list[str]]:
    """Families of the sampled runs -> what failed, one line each."""
    import torch

    from matrix.plan import RUNS, SAMPLE
    from matrix.runs import compute
    from matrix.test_matrix import TOLERANCE

    torch.set_num_threads(1)
    failed: dict[str, list[str]] = {}
    for run in RUNS:
        if run not in SAMPLE:
            continue
        family = failed.setdefault(run.case.split(" ")[0], [])
        try:
            error = compute(run).error
        except Exception as problem:  # noqa: BLE001  whatever another tree does is what is asked for
            family.append(f"{run}: {type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}")
        else:
            if not error < TOLERANCE:
                family.append(f"{run}: relative error {error:.2g}")
    return failed


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
    failed = sample()
    print("\nsample of the matrix")
    for family, lines in failed.items():
        print(f"  {family:<14} {'exact' if not lines else f'{len(lines)} failed'}")
        for line in lines[:3]:
            print(f"      {line[:200]}")
    return 1 if rows or any(failed.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
