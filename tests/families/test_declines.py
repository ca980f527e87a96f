"""What a plan cannot do is said in a sentence, on every rank, and never computed wrongly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from para_core.plans import PlanError, check, plan_for
from para_core.plans.plan import attribute

from .cases import CASES
from .ranks import latents, shared
from .tiny import Tiny, cogvideox, cosmos, ltx, noise, wan, whole

pytestmark = pytest.mark.usefixtures("comfy")


def plan_and(model: torch.nn.Module):
    plan = plan_for(model)
    assert plan is not None
    return plan, model


def few(build: Callable[[], Tiny], **changes) -> Tiny:
    model, call = build()
    return model, {**call, **changes}


@pytest.mark.parametrize(
    "name", [name for name in CASES if " " not in name or name in ("hunyuan video", "qwen image", "ltx video", "ltx 2")]
)
def test_what_the_split_reads_off_a_model_is_there(name: str) -> None:
    model, call = CASES[name]()
    plan, _ = plan_and(model)
    patch = attribute(model, plan.patch)
    assert isinstance(attribute(model, plan.heads), int)
    assert isinstance(patch, int) or len(patch) == latents(call)[0].ndim - 2
    assert plan.text is None or call[plan.text].ndim == 3


def test_control_blocks_after_the_last_block_are_declined() -> None:
    model, _ = wan.wan_class("VaceWanModel", build=dict(vace_layers=4, vace_in_dim=96))
    with pytest.raises(PlanError, match="VACE blocks follow the last block"):
        check(*plan_and(model))


def test_rows_that_are_frames_of_one_video_are_not_given_to_several_ranks() -> None:
    with pytest.raises(PlanError, match="batch rows of this U-Net are the frames"):
        check(*plan_and(whole.unet(video=True)[0]))
    assert check(*plan_and(whole.unet()[0])) == []


def test_missing_lists_and_renamed_arguments_are_declined() -> None:
    model, _ = cogvideox.cogvideox()
    plan, _ = plan_and(model)
    blocks = model.blocks
    del model.blocks
    with pytest.raises(PlanError, match="has no blocks"):
        check(plan, model)

    class Renamed(torch.nn.Module):
        def forward(self, tokens, encoder_hidden_states, temb, image_rotary_emb=None, transformer_options=None):
            return tokens, encoder_hidden_states

    model.blocks = torch.nn.ModuleList([Renamed() for _ in blocks])
    with pytest.raises(PlanError, match="Renamed.forward takes no hidden_states"):
        check(plan, model)


TOO_FEW: dict[str, Callable[[], Tiny]] = {
    "LTX-2 has too few rows of audio here \\(2\\) for 3 ranks": lambda: ltx.ltxav(audio=2),
    "Cosmos-Predict2 has too few rows of rows here \\(2\\)": lambda: few(cosmos.predict2, x=noise(2, 16, 3, 4, 14)),
    "Wan HuMo has too few rows of img": lambda: wan.wan_class("HumoWanModel", frames=2, audio_embed=noise(2, 2, 8, 5, 1280, seed=3)),
}


@pytest.mark.parametrize("sentence", TOO_FEW)
def test_fewer_rows_than_ranks_are_declined_before_anything_is_sent(sentence: str) -> None:
    model, call = TOO_FEW[sentence]()
    with pytest.raises(PlanError, match=sentence):
        shared(model, [call], 1, 3)


def test_stack_whose_last_block_is_skipped_is_no_result() -> None:
    model, call = wan.wan()
    options = {"patches_replace": {"dit": {("double_block", 3): lambda args, _: {"img": args["img"]}}}}
    with pytest.raises(RuntimeError):  # ComfyUI's own, if it comes to use the length first
        shared(model, [call], 1, 2, options=options)
