"""Whole runs over processes for what FLUX and Wan do not show: models entered at `forward`, and several latents at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity.inprocess import attached, reports

from para_core.settings import Cache, Parallel

from .cases import CASES
from .ranks import error
from .tiny import noise

pytestmark = pytest.mark.usefixtures("comfy")
STEPS = 2

# case: ComfyUI's configuration of it, and what a positive prompt carries besides its text
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mochi": ("GenmoMochi", {"attention_mask": (torch.arange(16)[None] < 11).long()}),
    "sd3.5 medium": ("SD3", {"pooled_output": noise(1, 24, seed=3)}),
    "minimax": ("MiniMaxH3", {}),
    "cosmos predict2": ("CosmosT2IPredict2", {}),
}


def patcher(name: str) -> tuple[Any, dict[str, Any]]:
    """A stock ModelPatcher of a tiny model, and the call that its builder gives."""
    import comfy.model_patcher
    import comfy.supported_models

    tiny, call = CASES[name]()
    config = getattr(comfy.supported_models, MODELS[name][0])(tiny.tiny_config)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device=torch.device("cpu"))
    model.diffusion_model.load_state_dict(tiny.state_dict())
    model.eval().requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu")), call


def sample(model: Any, name: str, call: dict[str, Any], cfg: float) -> list[torch.Tensor]:
    import comfy.nested_tensor
    import comfy.sample

    def latent(make) -> Any:
        parts = [make(part[:1]) for part in (call["x"] if isinstance(call["x"], list) else [call["x"]])]
        return comfy.nested_tensor.NestedTensor(parts) if len(parts) > 1 else parts[0]

    prompts = [[[call["context"][:1] * scale, dict(MODELS[name][1])]] for scale in (1.0, 0.7)]
    with torch.inference_mode():
        result = comfy.sample.sample(
            model, latent(torch.clone), STEPS, cfg, "euler", "simple", *prompts, latent(torch.zeros_like), disable_pbar=True, seed=1
        )
    return list(result.unbind()) if result.is_nested else [result]


SPLITS = {"sequence": Parallel(2, batch_degree=1), "batch": Parallel(2, batch_degree=2)}
QUICK = [("mochi", "sequence"), ("minimax", "batch")]
RUNS = [
    run if run in QUICK else pytest.param(*run, marks=pytest.mark.slow) for run in [(name, split) for name in MODELS for split in SPLITS]
]


@pytest.mark.parametrize("name, split", RUNS)
def test_run_over_processes_equals_stock(name: str, split: str) -> None:
    parallel = SPLITS[split]
    model, call = patcher(name)
    expected = sample(model, name, call, 3.0)
    with reports() as lines:
        result = sample(attached(model, parallel, Cache(threshold=1e-9)), name, call, 3.0)
    (report,) = lines
    assert report["notes"] == [] and report["degrees"] == ([2, 1, 1] if parallel.batch_degree == 2 else [1, 1, 2])
    assert error(result, expected) < 1e-5 * STEPS * 3


def test_forward_that_cannot_be_cut_for_so_many_ranks_is_computed_on_one() -> None:
    model, call = patcher("cosmos predict2")
    call["x"] = noise(1, 16, 3, 4, 14)  # two rows of tokens for three ranks
    expected = sample(model, "cosmos predict2", call, 1.0)
    with reports() as lines:
        result = sample(attached(model, Parallel(3)), "cosmos predict2", call, 1.0)
    (note,) = lines[0]["notes"]
    assert "Cosmos-Predict2 has too few rows" in note
    assert error(result, expected) < 1e-5
