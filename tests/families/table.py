"""The README's table of families, made from the plans and the list of cases.

    python3 tests/env/prepare.py run tests/families/table.py    prints it
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- families table -->", "<!-- /families table -->"

# family of the plan: first words of its cases, and what is special about it
ROWS: dict[str, tuple[tuple[str, ...], str]] = {
    "FLUX": (("flux", "flux2"), "references follow the picture; ranges with another timestep"),
    "Chroma": (("chroma",), "a modulation vector of its own for every block"),
    "HunyuanVideo": (("hunyuan video", "hunyuan image"), "reference first; the refined text is made whole before the blocks"),
    "Mochi": (("mochi",), "padding of the text is left out of attention"),
    "CogVideoX": (("cogvideox",), "positions added (1.0) or rotary (1.5)"),
    "Wan": (("wan",), "text by cross-attention; S2V, Animate and WanDancer with tokens whole between blocks"),
    "Wan VACE": (("wan vace",), "control blocks beside the others"),
    "Wan HuMo": (("wan humo",), "shards of whole frames, because audio belongs to a frame"),
    "MiniMax-H3": (("minimax",), "text, audio and video in one sequence, without a batch dimension"),
    "Qwen-Image": (("qwen image",), "references at timestep zero; a mask of the text inside the attention"),
    "LTX-Video": (("ltx video",), "a timestep for every token; guide strengths as a mask"),
    "LTX-2": (("ltx 2",), "two streams that attend to each other"),
    "Stable Diffusion 3": (("sd3", "sd3.5 medium"), "3.5 medium attends to the image a second time"),
    "Lumina 2": (("lumina 2", "z-image"), "text, references and image in one sequence"),
    "HiDream": (("hidream",), "text is whole between blocks"),
    "Cosmos-Predict2": (("cosmos predict2", "anima"), "tokens stay a grid, cut along its rows"),
    "Cosmos 1": (("cosmos 1",), "tokens whole between blocks"),
}


def of(family: str, names: list[str]) -> dict[str, list[str]]:
    """The cases of a family: by their first words, the rest of each. The longest first words of any family count."""
    every = sorted((words for prefixes, _ in ROWS.values() for words in prefixes), key=len, reverse=True)
    found: dict[str, list[str]] = {words: [] for words in ROWS[family][0]}
    for name in names:
        owner = next((words for words in every if name == words or name.startswith(f"{words} ")), None)
        if owner in found and name != owner:
            found[owner].append(name.removeprefix(owner).strip())
    return found


def table() -> str:
    """The table's text, between its two comments."""
    from families.cases import CASES
    from para_core.plans import PLANS

    lines = ["| Family | Tested as | Block lists that are cut | Special |", "| --- | --- | --- | --- |"]
    for family, (_, special) in ROWS.items():
        cases = of(family, list(CASES))
        tested = "; ".join(words + (f" ({', '.join(rest)})" if rest else "") for words, rest in cases.items())
        paths = dict.fromkeys(spec.path for plan in PLANS if plan.family == family for spec in plan.stacks)
        lines.append(f"| {family} | {tested} | {', '.join(f'`{path}`' for path in paths)} | {special} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    print(BEGIN, table(), END, sep="\n")
