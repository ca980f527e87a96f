"""The table of which family reads what a neighbour leaves for it is what ComfyUI's source says."""

from __future__ import annotations

import inspect
import re
import sys
from functools import cache
from types import ModuleType

import pytest
import torch
from families.cases import CASES, UNCUT

from .axes import READERS

# what a method that reads it has in its source
READ = {
    "control": "control.get(",
    "rope options": '"rope_options"',
    "attn1 patch": '"attn1_patch"',
    "attn1 output patch": '"attn1_output_patch"',
    "post input patch": '"post_input"',
    "skipped block": '"patches_replace"',
}


def source(model: torch.nn.Module) -> str:
    """Of the methods of a model and its parts, and of the functions beside it."""
    kinds = {kind for part in model.modules() for kind in type(part).__mro__ if kind.__module__.startswith("comfy.ldm.")}
    return "\n".join(functions(one) for one in (*kinds, sys.modules[type(model).__module__]))


@cache
def functions(holder: type | ModuleType) -> str:
    home = getattr(holder, "__module__", holder.__name__)
    found = [one for one in vars(holder).values() if inspect.isfunction(one) and one.__module__ == home]
    return "\n".join(map(inspect.getsource, found))


# set by the family's own forward, or looked for by the library itself
OWN = {"patches", "patches_replace", "block_index", "block_type", "total_blocks", "img_slice", "grid_sizes"}
OWN |= {"reference_image_num_tokens", "model_patch_data", "activations_shape", "block", "original_shape", "transformer_index"}


@pytest.mark.usefixtures("comfy")
def test_options_that_a_family_reads_are_in_its_plan() -> None:
    """All others are taken away before a capture, and out of compiled blocks."""
    from para_core.plans import plan_for

    missing = []
    for case, build in {**CASES, **UNCUT}.items():
        model = build()[0]
        plan, text = plan_for(model), source(model)
        if plan is None:
            continue
        read = set(re.findall(r"""transformer_options(?:\.get\(|\[)["'](\w+)""", text))
        missing += [f"{case}: {name}" for name in sorted(read - OWN - set(plan.options))]
    assert not missing


@pytest.mark.usefixtures("comfy")
def test_a_family_is_a_reader_if_and_only_if_its_source_reads() -> None:
    assert set(READ) == set(READERS)
    wrong = []
    for case, build in CASES.items():
        model = build()[0]
        text = source(model)
        for neighbour, word in READ.items():
            if (word in text) != case.startswith(READERS[neighbour]):
                wrong.append(f"{case}: {neighbour}: {'not in the table' if word in text else 'does not read it'}")
    assert not wrong
