"""What a plan cannot do is said in a sentence, on every rank, and never computed wrongly."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import pytest
import torch

from para_core.plans import PLANS, PlanError, check, plan_for
from para_core.plans.plan import attribute, patch_sides

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
    assert isinstance(attribute(model, plan.heads), int)
    assert len(patch_sides(plan, model, latents(call)[0].ndim - 2)) == latents(call)[0].ndim - 2
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

    class Deaf(torch.nn.Module):
        def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None):
            return hidden_states, encoder_hidden_states

    model.blocks = torch.nn.ModuleList([Deaf() for _ in blocks])
    with pytest.raises(PlanError, match="Deaf.forward takes no transformer_options"):
        check(plan, model)


@pytest.mark.parametrize("path", ["num_attention_heads", "patch_size_t"])
def test_a_model_without_what_the_split_reads_off_it_is_declined(path: str) -> None:
    model, _ = cogvideox.cogvideox()
    plan, _ = plan_and(model)
    check(plan, model)
    delattr(model, path)
    with pytest.raises(PlanError, match=f"has no {path}: this version of ComfyUI"):
        check(plan, model)


TOO_FEW: dict[str, Callable[[], Tiny]] = {
    "LTX-2 has too few rows of audio here \\(2\\) for 3 ranks": lambda: ltx.ltxav(audio=2),
    "Cosmos-Predict2 has too few rows of rows here \\(2\\)": lambda: few(cosmos.predict2, x=noise(2, 16, 3, 4, 14)),
    "Wan HuMo has too few rows of img": lambda: wan.wan_class("HumoWanModel", size=(2, 6, 10), audio_embed=noise(2, 2, 8, 5, 1280, seed=3)),
}


@pytest.mark.parametrize("sentence", TOO_FEW)
def test_fewer_rows_than_ranks_are_declined_before_anything_is_sent(sentence: str) -> None:
    model, call = TOO_FEW[sentence]()
    with pytest.raises(PlanError, match=sentence):
        shared(model, [call], 1, 3)


# diffusion models of ComfyUI 0.30.0 that no plan names: they run stock
STOCK = """
ace.ace_step15.AceStepConditionGenerationModel ace.model.ACEStepTransformer2DModel audio.dit.AudioDiffusionTransformer
boogu.model.BooguTransformer2DModel cascade.stage_b.StageB cascade.stage_c.StageC
hidream_o1.model.HiDreamO1Transformer hunyuan3d.model.Hunyuan3Dv2 hunyuan3dv2_1.hunyuandit.HunYuanDiTPlain
hydit.models.HunYuanDiT ideogram4.model.Ideogram4Transformer2DModel joyimage.model.JoyImageTransformer3DModel
lens.model.LensTransformer2DModel mage_flow.model.MageFlowTransformer2DModel
pixart.pixartms.PixArtMS pixeldit.model.PixDiT_T2I pixeldit.pid.PidNet
seedvr.model.NaDiT triposplat.model.LatentSeqMMFlowModel wan.ar_model.CausalWanModel
"""
NO_DIFFUSION = {"rt_detr.rtdetr_v4.RTv4", "depth_anything_3.model.DepthAnything3Net", "sam3.detector.SAM3Model"}


def test_every_model_of_comfyui_has_a_plan_or_is_known_to_run_stock() -> None:
    import comfy.model_base

    source = inspect.getsource(comfy.model_base)
    classes = set()
    for word in set(re.findall(r"unet_model=([A-Za-z][\w.]*)", source)) - {"unet_model"}:
        kind = eval(word, vars(comfy.model_base))  # noqa: S307  a name in ComfyUI's own source
        classes.add(f"{kind.__module__}.{kind.__qualname__}".removeprefix("comfy.ldm."))
    planned = {name.removeprefix("ldm.") for plan in PLANS for name in plan.models}
    unknown = {name for name in classes if not any(name.endswith(end) for end in planned)}
    assert unknown == set(STOCK.split()) | NO_DIFFUSION
