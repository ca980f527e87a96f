"""What a sidecar's weights cost in host memory. On CPU ranks each process holds the model once; nothing may come on top."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from env import models
from parity.inprocess import run

from para_core.settings import Parallel

from .cases import unet
from .files import Folder
from .test_weights import JOB

pytestmark = [pytest.mark.usefixtures("comfy"), pytest.mark.slow]


def large() -> dict[str, torch.Tensor]:
    """245 MB."""
    return models.flux(seed=41, heads=4, double_blocks=4, single_blocks=6)


def memory(pid: int, key: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def test_a_sidecar_never_holds_more_than_the_model_and_a_bucket(folder: Folder) -> None:
    from para_core.comfy import sidecars
    from para_core.group.weights import BUCKET

    run(unet(folder), JOB, Parallel(2))
    (pid,) = sidecars.group().pids

    def peak(model) -> int:
        before = memory(pid, "VmRSS")
        Path(f"/proc/{pid}/clear_refs").write_text("5")
        _, report = run(model, JOB, Parallel(2))
        assert report["ranks"] == 2 and report["notes"] == []
        return memory(pid, "VmHWM") - before

    with torch.inference_mode():
        model = unet(folder, name="flux_large", make=large)
    size = model.model_size()
    assert size > 200 * 2**20
    assert peak(model) < size + 3 * BUCKET
    changed = model.clone()
    everywhere = {key: ("diff", (torch.full_like(value, 0.001),)) for key, value in model.model_state_dict("diffusion_model.").items()}
    assert len(changed.add_patches(everywhere, 0.5)) == len(everywhere) > 100
    assert peak(changed) < 3 * BUCKET, "patched weights take the place of the unpatched ones"
