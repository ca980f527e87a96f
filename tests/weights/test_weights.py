"""Every way to bring weights: shared by ranks as stock computes them, with rank 0's bits on every rank, or a clear sentence."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from parity import inprocess
from parity.inprocess import error, run, sample
from publishing.checkout import ROOT

from para_core.settings import Parallel

from .cases import CASES, ROWS, SPLIT
from .files import Folder

pytestmark = pytest.mark.usefixtures("comfy")

JOB = inprocess.Job("flux", (5, 8), steps=2)
FIRST = {row: name for name, (row, _) in reversed(CASES.items())}
SHARED = [name for name, (_, case) in CASES.items() if not case.sentence]


def sampled(names: list[str]) -> list[Any]:
    """All cases; those beyond the first of each row are for the long suite."""
    return [name if name in FIRST.values() else pytest.param(name, marks=pytest.mark.slow) for name in names]


def prepared(folder: Folder, name: str) -> Any:
    with torch.inference_mode():  # as ComfyUI runs every node
        return CASES[name][1].make(folder)


@pytest.mark.parametrize("name", sampled(list(CASES)))
def test_run_is_shared_and_equals_stock_or_stays_on_one_rank_and_says_why(folder: Folder, name: str) -> None:
    case = CASES[name][1]
    model = prepared(folder, name)
    expected = sample(model, JOB)
    result, report = run(model, JOB, Parallel(2))
    if case.sentence:
        (note,) = report["notes"]
        assert note.startswith("This run stays on one GPU") and case.sentence in note and report["ranks"] == 1
        assert torch.equal(result, expected)
    else:
        assert report["notes"] == [] and report["ranks"] == 2
        assert error(result, expected) < case.tolerance * JOB.steps


def sidecar(model: Any) -> Any:
    """What a sidecar makes of ``model``, with everything sent through the codec but none of the processes."""
    from para_core.comfy import model as models
    from para_core.group.codec import decode, encode, pack, unpack

    def sent(value: Any) -> Any:
        header, tensors = encode(value)
        return decode(json.loads(json.dumps(header)), tensors)

    own = models.build(sent(models.recipe(model)), torch.device("cpu"))
    for unit in models.units(model):
        buffer, layout = pack(list(unit.read()))
        models.fill(own, dict(zip([name for name, _, _ in sent(unit.rows)], unpack(buffer, layout), strict=True)))
    models.ready(own, sent(models.options(model)))
    return own


def state(model: Any) -> dict[str, tuple[Any, ...]]:
    """Bits of every tensor of the diffusion model."""
    from para_core.group.codec import as_bytes

    found = {**dict(model.model.diffusion_model.named_buffers()), **model.model.diffusion_model.state_dict()}
    return {name: (tensor.dtype, tensor.shape, as_bytes(tensor).numpy().tobytes()) for name, tensor in found.items()}


@pytest.mark.parametrize("name", sampled(SHARED))
def test_a_sidecar_holds_the_bits_that_rank_0_computes_with(folder: Folder, name: str) -> None:
    import comfy.model_management

    with torch.inference_mode():
        model = prepared(folder, name)
        raw = state(model)
        comfy.model_management.load_models_gpu([model])
        patched = state(model)
        assert state(sidecar(model)) == patched
        assert (patched != raw) == bool(model.patches)


PLAIN = next(iter(CASES))
CONTROL = next(name for name in CASES if "[control]" in name)
CHANGES = ["LoRA, alone and in a stack [lora]", "LoRA, alone and in a stack [stack]", CONTROL, PLAIN]


def test_changed_patches_send_the_layers_that_changed_and_no_others(folder: Folder) -> None:
    from para_core.comfy import sidecars

    counts = sidecars.group().counts
    base = prepared(folder, PLAIN)
    run(base, JOB, Parallel(2))
    sent = counts["models"]
    for name in CHANGES:
        model = prepared_on(folder, base, name)
        expected, patches = sample(model, JOB), counts["patches"]
        result, report = run(model, JOB, Parallel(2))
        assert report["ranks"] == 2 and error(result, expected) < 1e-5 * JOB.steps
        assert counts["patches"] == patches + 1
        run(model, JOB, Parallel(2))
        assert counts["patches"] == patches + 1, "unchanged patches send nothing"
    assert counts["models"] == sent


def prepared_on(folder: Folder, base: Any, name: str) -> Any:
    """A case's patches on one loaded model, as a graph has it whose loader does not run again."""
    with torch.inference_mode():
        patched, model = prepared(folder, name), base.clone()
        model.patches = {key: list(stack) for key, stack in patched.patches.items()}
        model.patches_uuid = patched.patches_uuid
        return model


def test_the_readme_lists_these_rows() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- weights table -->\n(.*?)<!-- /weights table -->", text, re.DOTALL)
    assert found is not None
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", found.group(1), re.MULTILINE)[1:]  # below the line under the head
    assert [row for row, _ in rows] == list(ROWS)
    for row, runs in rows:
        assert runs.partition(":")[0].partition(".")[0] == ROWS[row].runs, row
        assert all(bool(case.sentence) == (ROWS[row].runs != SPLIT) for case in ROWS[row].cases.values())
