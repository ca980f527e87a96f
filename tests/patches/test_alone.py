"""What runs on one GPU says so in a sentence that names it, and gives stock's result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import test_processes as families
from parity.inprocess import Job, attached, error, load, sample

from para_core.settings import Parallel

pytestmark = pytest.mark.usefixtures("comfy")
START = "[ParaDiT] This run stays on one GPU: "


@pytest.fixture
def alone(caplog: pytest.LogCaptureFixture) -> Callable[[Any, Callable[[Any], Any], str], Any]:
    """Sample with the split node on the model; nothing may be sent to other ranks, and the sentence must be the only one."""

    def run(model: Any, sampled: Callable[[Any], Any], sentence: str) -> Any:
        from para_core.comfy import sidecars

        steps, starts = sidecars.group().counts["steps"], sidecars.group().counts["starts"]
        caplog.clear()
        result = sampled(attached(model, Parallel(2)))
        assert (sidecars.group().counts["steps"], sidecars.group().counts["starts"]) == (steps, starts)
        said = [record.getMessage() for record in caplog.records if record.name == "paradit" and record.levelname == "WARNING"]
        assert len(said) == 1 and said[0].startswith(START + sentence), said
        return result

    return run


def test_lora_as_a_conditioning_hook(alone) -> None:
    import comfy.hooks
    import comfy.utils
    from env import models
    from env.prepare import Environment

    lora = comfy.utils.load_torch_file(str(Environment.locate().models / "loras" / models.FLUX_LORA_FILE), safe_load=True)
    model, job = load("flux"), Job()

    def hooked(model: Any) -> torch.Tensor:
        return sample(model, job, extra={"hooks": comfy.hooks.create_hook_lora(lora, 0.7, 0.0)})

    expected = hooked(model)
    assert error(expected, sample(model, job)) > 1e-3
    assert torch.equal(alone(model, hooked, "conditioning hooks (a LoRA as a hook) change the model's weights"), expected)


def test_flux_kv_cache(alone) -> None:
    from comfy_extras.nodes_flux import FluxKVCache

    def model() -> Any:
        return FluxKVCache.execute(load("flux")).args[0]  # what it keeps is of one run

    job = Job(steps=3)
    expected = sample(model(), job)
    result = alone(model(), lambda model: sample(model, job), "Flux KV Cache drops tokens after the first step")
    assert torch.equal(result, expected)


@pytest.mark.parametrize("node, sentence", [("tome", "Token Merging (ToMe) merges tokens"), ("hypertile", "HyperTile cuts the image")])
def test_nodes_that_merge_tokens_or_cut_them_into_tiles(node: str, sentence: str, alone) -> None:
    from comfy_extras.nodes_hypertile import HyperTile
    from comfy_extras.nodes_tomesd import TomePatchModel

    model, call = families.patcher("mochi")  # whose blocks call no such patch; FLUX and Wan fail with these nodes in stock code
    patched = TomePatchModel.execute(model, 0.3).args[0] if node == "tome" else HyperTile.execute(model, 256, 2, 0, False)[0]

    def sampled(model: Any) -> list[torch.Tensor]:
        return families.sample(model, "mochi", call, 3.0)

    expected = sampled(patched)
    assert all(torch.equal(*pair) for pair in zip(alone(patched, sampled, sentence), expected, strict=True))


def test_core_multigpu(alone) -> None:
    model, job = load("flux").clone(), Job(cfg=4.0)
    expected = sample(model, job)
    model.set_additional_models("multigpu", [load("flux").clone()])  # what the node does where there is a second GPU
    result = alone(model, lambda model: sample(model, job), "ComfyUI's MultiGPU CFG Split already spreads this model")
    assert error(result, expected) < 1e-5 * 2 * job.steps
