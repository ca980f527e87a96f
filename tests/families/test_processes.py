"""Whole runs over processes for what FLUX and Wan do not show: models entered at `forward`, and several latents at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity.inprocess import attached, reports

from para_core.settings import Cache, Parallel

from .cases import CASES
from .ranks import error
from .stock import MODELS, patcher, prompt
from .tiny import noise

pytestmark = pytest.mark.usefixtures("comfy")
STEPS = 2


def sample(
    model: Any, name: str, call: dict[str, Any], cfg: float, *, images: int = 1, negative_tokens: int | None = None
) -> list[torch.Tensor]:
    """`negative_tokens`: another number of them than the prompt's, so that stock code makes two calls."""
    import comfy.nested_tensor
    import comfy.sample

    def latent(make) -> Any:
        parts = [make(torch.cat([part[:1]] * images)) for part in (call["x"] if isinstance(call["x"], list) else [call["x"]])]
        return comfy.nested_tensor.NestedTensor(parts) if len(parts) > 1 else parts[0]

    prompts = [prompt(name, call), prompt(name, call, 0.7, negative_tokens)]
    with torch.inference_mode():
        result = comfy.sample.sample(
            model, latent(torch.clone), STEPS, cfg, "euler", "simple", *prompts, latent(torch.zeros_like), disable_pbar=True, seed=1
        )
    return list(result.unbind()) if result.is_nested else [result]


def test_a_forecast_counts_the_tokens_of_the_video_where_there_is_sound_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI samples several latents as one long row."""
    from para_core.comfy import split
    from para_core.execution import gain

    counted: list[int] = []
    tokens = split.image_tokens

    def enough(*_args: Any) -> float:
        raise split.Unshareable("the test has seen enough")

    monkeypatch.setattr(split, "processors_of_their_own", lambda _device: True)
    monkeypatch.setattr(split, "image_tokens", lambda *args: counted.append(tokens(*args)) or counted[-1])
    monkeypatch.setattr(gain, "matrix_rate", enough)
    model, call = patcher("ltx 2")
    sample(attached(model, Parallel(2, careful=True)), "ltx 2", call, 3.0)
    assert counted[-1] == call["x"][0][0, 0].numel()


SPLITS = {"sequence": Parallel(2, batch_degree=1), "batch": Parallel(2, batch_degree=2)}
QUICK = [("mochi", "sequence"), ("minimax", "batch")]
RUNS = [
    (name, split) if (name, split) in QUICK else pytest.param(name, split, marks=pytest.mark.slow)
    for name in MODELS
    for split in SPLITS
    if name in CASES
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


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [(1, 8, 1), (1, 4, 2), (2, 2, 2), (2, 4, 1)], ids=str)
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_eight_ranks_equal_stock(name: str, degrees: tuple[int, int, int]) -> None:
    """What no machine of this project has had GPUs for. Text and image have at least a row a rank."""
    batch, ring, ulysses = degrees
    model, call = patcher(name)
    expected = sample(model, name, call, 3.0)
    with reports() as lines:
        result = sample(attached(model, Parallel(8, batch_degree=batch, ring_degree=ring, ulysses_degree=ulysses)), name, call, 3.0)
    assert lines[0]["notes"] == [] and lines[0]["degrees"] == list(degrees)
    assert error(result, expected) < 1e-5 * STEPS * 3


def test_degrees_are_lowered_to_the_rows_there_are() -> None:
    model, call = patcher("cosmos predict2")
    call["x"] = noise(1, 16, 3, 4, 14)  # two rows of tokens for three ranks
    expected = sample(model, "cosmos predict2", call, 1.0)
    with reports() as lines:
        result = sample(attached(model, Parallel(3)), "cosmos predict2", call, 1.0)
    (note,) = lines[0]["notes"]
    assert "The shortest segment has only 2 tokens: running batch x ring x ulysses = 1 x 1 x 2" in note
    assert lines[0]["degrees"] == [1, 1, 2]
    assert error(result, expected) < 1e-5 * STEPS


BATCHES: dict[str, dict[str, Any]] = {
    "two prompts": {},
    "two prompts of two lengths": {"negative_tokens": 4},
    "three images, two prompts": {"images": 3},
}


@pytest.mark.parametrize("batch", [name if name != "two prompts" else pytest.param(name, marks=pytest.mark.slow) for name in BATCHES])
@pytest.mark.parametrize("name", ["unet", "aura", "ernie"])
def test_batch_rows_of_a_model_that_is_not_cut_run_on_several_ranks(name: str, batch: str) -> None:
    model, call = patcher(name)
    expected = sample(model, name, call, 3.0, **BATCHES[batch])
    with reports() as lines:
        result = sample(attached(model, Parallel(3), Cache(0.5)), name, call, 3.0, **BATCHES[batch])
    (report,) = lines
    assert report["degrees"] == ([3, 1, 1] if "images" in batch else [2, 1, 1])
    kind = type(model.model.diffusion_model).__name__
    assert report["notes"] == [
        f"No step is cached: the rule classic does not know the blocks of {kind}; forecast works there too.",
        f"Of {kind}, prompts and images of a batch run on several GPUs; one image of one prompt runs on one.",
    ]
    assert error(result, expected) < 1e-5 * STEPS * 3


def test_one_image_of_one_prompt_is_not_cut_there() -> None:
    model, call = patcher("unet")
    with reports() as lines:
        result = sample(attached(model, Parallel(2)), "unet", call, 1.0)
    assert lines[0]["degrees"] == [1, 1, 1]
    assert error(result, sample(model, "unet", call, 1.0)) == 0


def test_any_other_model_runs_stock_and_a_sentence_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, call = patcher("pixart")
    sentence = "ParaDiT does not know the model PixArtMS: it runs on one GPU, and its blocks as they are."
    stock = sample(model, "pixart", call, 3.0, images=2)
    with caplog.at_level("WARNING", logger="paradit"):
        result = sample(attached(model, Parallel(2), Cache(0.5)), "pixart", call, 3.0, images=2)
    assert [record.getMessage() for record in caplog.records if record.name == "paradit"] == [f"[ParaDiT] {sentence}"]
    assert all(torch.equal(one, other) for one, other in zip(result, stock, strict=True))
