"""Writes workflows/*.json and *.jpg of the families below, and stock_nodes.json, from a running ComfyUI's own schemas.

    python3 tests/env/prepare.py run tests/publishing/make_workflows.py

A new family is one more function here, and one line in RECIPES.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]

from publishing import stock_nodes, thumbnail  # noqa: E402
from publishing.sheet import File, Sheet  # noqa: E402

HUB = "https://huggingface.co"
FLUX_TEXT = f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main"
AE = File(f"{HUB}/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors", "vae")
T5 = File(f"{FLUX_TEXT}/t5xxl_fp16.safetensors", "text_encoders")
POOR = "low quality, blurry, deformed, extra limbs, watermark, text"
POOR_VIDEO = "low quality, blurry, flickering, still frame, deformed, subtitles, watermark"
FOX = "A red fox trots through fresh snow between birch trees, its breath visible in the cold morning light, the camera follows at its side"
KITCHEN = "A lighthouse keeper's kitchen at dawn: copper pans on the wall, steam over a blue enamel kettle, rain on the window"
HARBOUR = "A small fishing harbour at low tide, boats leaning on wet sand, gulls circling, thin fog over the breakwater, early light"


def diffusion(url: str) -> File:
    return File(url if url.startswith("/") else f"{HUB}/{url}", "diffusion_models")


def encoder(url: str) -> File:
    return File(f"{HUB}/{url}", "text_encoders")


def decoder(url: str) -> File:
    return File(f"{HUB}/{url}", "vae")


class Recipe:
    """The usual parts of a graph: loaders, our nodes, prompts, sampler, result."""

    def __init__(self, name: str, info: dict[str, Any], title: str, *, press: str = "", cache: float = 0.08, video: bool = False):
        self.sheet, self.title, self.press, self.video = Sheet(name, info), title, press, video
        self.threshold, self.alone = cache, False
        self.sheet.note("", 560)

    def accelerated(self, model: list) -> list:
        """Our three nodes, in the group's frame."""
        model = self.sheet.add("ParaParallel", 1, model=model)
        model = self.sheet.add("ParaAttention", 2, model=model)
        return self.sheet.add("ParaFirstBlockCache", 2, model=model, threshold=self.threshold)

    def one(self, model: list) -> list:
        """The one node for most people, in the group's frame."""
        self.sheet.framed = "ParaDiT: bypass this one to compare with a stock run"
        self.alone = True
        return self.sheet.add("ParaAccelerate", 1, model=model)

    def model(self, file: File, shift: tuple[str, dict[str, float]] | None = None) -> list:
        model = self.sheet.add("UNETLoader", 0, unet_name=file)
        if shift is not None:
            model = self.sheet.add(shift[0], 0, model=model, **shift[1])
        return self.accelerated(model)

    def prompts(self, clip: list, positive: str, negative: str | None, *, kind: str = "CLIPTextEncode", field: str = "text") -> list[list]:
        """Both conditionings; without a negative text the positive one is zeroed."""
        first = self.sheet.add(kind, 1, True, title="Prompt", clip=clip, **{field: positive})
        if negative is None:
            return [first, self.sheet.add("ConditioningZeroOut", 2, True, conditioning=first)]
        return [first, self.sheet.add(kind, 1, True, title="Negative prompt", clip=clip, **{field: negative})]

    def sample(self, model: list, prompts: list[list], latent: list, steps: int, cfg: float, sampler: str, scheduler: str) -> list:
        links = {"model": model, "positive": prompts[0], "negative": prompts[1], "latent_image": latent}
        return self.sheet.add("KSampler", 3, **links, seed=20261, steps=steps, cfg=cfg, sampler_name=sampler, scheduler=scheduler)

    def result(
        self, latent: list, vae: list, *, fps: float = 0.0, audio: Callable[[], list] | None = None, column: int = 3, report: bool = False
    ) -> str:
        """Decode and save, with a report if wanted; the finished file's text."""
        if report:
            latent = self.sheet.add("ParaReport", column + 1, True, wide=460, samples=latent)
        images = self.sheet.add("VAEDecode", column, True, samples=latent, vae=vae)
        prefix = f"paradit/{self.sheet.name}"
        if fps:
            sound = {"audio": audio()} if audio is not None else {}
            made = self.sheet.add("CreateVideo", column, True, images=images, fps=fps, **sound)
            self.sheet.add("SaveVideo", column + 1, wide=460, video=made, filename_prefix=f"video/{prefix}")
        else:
            self.sheet.add("SaveImage", column + 1, wide=460, images=images, filename_prefix=prefix)
        self.sheet.nodes[0]["widgets_values"] = [self._note_of_one() if self.alone else self._note()]
        return self.sheet.text()

    def _head(self) -> str:
        files = "\n".join(file.line for file in self.sheet.files.values())
        return f"# {self.title} with ParaDiT\n\n**Load** (put the files in these folders, then press R to refresh the lists)\n{files}\n\n"

    def _note_of_one(self) -> str:
        return (
            f"{self._head()}"
            f"**Press** Run. {self.press}The green nodes are all that was added to a stock graph.\n\n"
            "**Accelerate Sampling** sets everything for this machine: how many GPUs work on a step, the attention kernel, "
            "how many steps are reused, whether blocks are compiled. The first run takes longer where blocks are compiled. "
            "In your own graphs, put it between the model (after its LoRAs) and the sampler.\n\n"
            "**cache** is the choice that changes the picture: `quality` skips few steps, `fast` many, `off` none.\n\n"
            "**Sampling Report** says what the run did: seconds of every step, GPUs, kernels, cached steps, fallbacks and why.\n\n"
            "To compare, select *Accelerate Sampling*, press Ctrl+B (bypass) and run again with the seed set to *fixed*."
        )

    def _note(self) -> str:
        wanted = "the motion" if self.video else "the picture"
        cache = f"a careful threshold to begin with. Raise it while you like {wanted}; 0 turns it off."
        if not self.threshold:
            cache = "off (threshold 0), because a distilled model needs each of its few steps."
        return (
            f"{self._head()}"
            f"**Press** Run. {self.press}The three green nodes are all that was added to a stock graph.\n\n"
            "**Split Steps Across GPUs**: 0 uses every visible GPU. With one GPU the node does nothing, and the rest works as it is.\n\n"
            "**Attention Backend**: `auto` takes the fastest kernel that is installed; `exact` leaves out those that quantise.\n\n"
            f"**First Block Cache**: {cache}\n\n"
            "To compare, select the three green nodes, press Ctrl+B (bypass) and run again with the seed set to *fixed*."
        )


def accelerate_flux(name: str, info: dict) -> str:
    make = Recipe(name, info, "FLUX.1 [dev], Accelerate Sampling")
    file = diffusion("Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors")
    model = make.one(make.sheet.add("UNETLoader", 0, unet_name=file))
    clip = make.sheet.add(
        "DualCLIPLoader", 0, True, clip_name1=File(f"{FLUX_TEXT}/clip_l.safetensors", "text_encoders"), clip_name2=T5, type="flux"
    )
    vae = make.sheet.add("VAELoader", 0, True, vae_name=AE)
    positive, negative = make.prompts(clip, KITCHEN, None)
    positive = make.sheet.add("FluxGuidance", 2, True, conditioning=positive, guidance=3.5)
    latent = make.sheet.add("EmptySD3LatentImage", 2, True, width=1024, height=1024)
    sampled = make.sample(model, [positive, negative], latent, 28, 1.0, "euler", "simple")
    return make.result(sampled, vae, report=True)


def hunyuan_video(name: str, info: dict) -> str:
    hub = "Comfy-Org/HunyuanVideo_repackaged/resolve/main/split_files"
    make = Recipe(name, info, "HunyuanVideo text to video", cache=0.05, video=True)
    file = diffusion(f"{hub}/diffusion_models/hunyuan_video_t2v_720p_bf16.safetensors")
    model = make.model(file, ("ModelSamplingSD3", {"shift": 7.0}))
    texts = {"clip_name1": File(f"{FLUX_TEXT}/clip_l.safetensors", "text_encoders")}
    texts["clip_name2"] = encoder(f"{hub}/text_encoders/llava_llama3_fp8_scaled.safetensors")
    clip = make.sheet.add("DualCLIPLoader", 0, True, **texts, type="hunyuan_video")
    vae = make.sheet.add("VAELoader", 0, True, vae_name=decoder(f"{hub}/vae/hunyuan_video_vae_bf16.safetensors"))
    positive, negative = make.prompts(clip, FOX, None)
    positive = make.sheet.add("FluxGuidance", 2, True, conditioning=positive, guidance=6.0)
    latent = make.sheet.add("EmptyHunyuanLatentVideo", 2, True, width=848, height=480, length=73)
    return make.result(make.sample(model, [positive, negative], latent, 30, 1.0, "euler", "simple"), vae, fps=24.0)


def mochi(name: str, info: dict) -> str:
    hub = "Comfy-Org/mochi_preview_repackaged/resolve/main/split_files"
    make = Recipe(name, info, "Mochi 1 text to video", cache=0.05, video=True)
    model = make.model(diffusion(f"{hub}/diffusion_models/mochi_preview_bf16.safetensors"))
    text = encoder(f"{hub}/text_encoders/t5xxl_fp16.safetensors")
    clip = make.sheet.add("CLIPLoader", 0, True, clip_name=text, type="mochi")
    vae = make.sheet.add("VAELoader", 0, True, vae_name=decoder(f"{hub}/vae/mochi_vae.safetensors"))
    prompts = make.prompts(clip, FOX, POOR_VIDEO)
    latent = make.sheet.add("EmptyMochiLatentVideo", 2, True, width=848, height=480, length=37)
    return make.result(make.sample(model, prompts, latent, 30, 4.5, "euler", "simple"), vae, fps=24.0)


def cogvideox(name: str, info: dict) -> str:
    press = (
        "ComfyUI reads CogVideoX in a layout of its own (tensors named `blocks.0.norm1...`): a file from another program, "
        "with `transformer_blocks`, has to be converted first, and we know of no published conversion of the text-to-video model. "
    )
    make = Recipe(name, info, "CogVideoX text to video", press=press, cache=0.05, video=True)
    model = make.model(diffusion("/cogvideox_5b.safetensors"))
    clip = make.sheet.add("CLIPLoader", 0, True, clip_name=T5, type="cogvideox")
    vae = make.sheet.add("VAELoader", 0, True, vae_name=decoder("Comfy-Org/void-model/resolve/main/vae/cogvideox_vae.safetensors"))
    prompts = make.prompts(clip, FOX, POOR_VIDEO)
    latent = make.sheet.add("EmptyHunyuanLatentVideo", 2, True, width=720, height=480, length=49)
    return make.result(make.sample(model, prompts, latent, 50, 6.0, "euler", "simple"), vae, fps=8.0)


def minimax_h3(name: str, info: dict) -> str:
    hub = "Comfy-Org/MiniMax-H3/resolve/main"
    press = "Describe the shots and the sound together; the length snaps to 17 n + 5 frames. "
    make = Recipe(name, info, "MiniMax-H3 text to video with sound", press=press, cache=0.05, video=True)
    model = make.model(diffusion(f"{hub}/diffusion_models/minimax_h3_fl2va_pruned_int8_convrot.safetensors"))
    text = encoder(f"{hub}/text_encoders/qwen3vl_32b_minimax_h3_nvfp4_awq.safetensors")
    clip = make.sheet.add("CLIPLoader", 0, True, clip_name=text, type="minimax")
    title = {"title": "Load video VAE"}
    vae = make.sheet.add("VAELoader", 0, True, **title, vae_name=decoder(f"{hub}/vae/minimax_h3_video_vae_fp16.safetensors"))
    title = {"title": "Load audio VAE"}
    audio = make.sheet.add("VAELoader", 0, True, **title, vae_name=decoder(f"{hub}/vae/minimax_h3_audio_vae_fp32.safetensors"))
    prompts = make.prompts(clip, f"{FOX}. Sound: light steps in snow, a crow far away, wind in bare branches.", None)
    latent = make.sheet.add("EmptyMiniMaxH3LatentAV", 2, True, width=1344, height=768, length=124)
    both = make.sample(model, prompts, latent, 20, 1.0, "res_multistep", "simple")
    return make.result(both, vae, fps=24.0, audio=lambda: make.sheet.add("VAEDecodeAudio", 3, True, samples=both, vae=audio))


def qwen(make: Recipe, file: str) -> tuple[list, list, list]:
    hub = "Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files"
    model = make.model(diffusion(file), ("ModelSamplingAuraFlow", {"shift": 3.1}))
    text = encoder(f"{hub}/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors")
    clip = make.sheet.add("CLIPLoader", 0, True, clip_name=text, type="qwen_image")
    vae = make.sheet.add("VAELoader", 0, True, vae_name=decoder(f"{hub}/vae/qwen_image_vae.safetensors"))
    return model, clip, vae


def qwen_image(name: str, info: dict) -> str:
    make = Recipe(name, info, "Qwen-Image")
    hub = "Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files"
    model, clip, vae = qwen(make, f"{hub}/diffusion_models/qwen_image_2512_fp8_e4m3fn.safetensors")
    prompts = make.prompts(clip, f'{KITCHEN}, a note on the door that reads "back before the tide"', POOR)
    latent = make.sheet.add("EmptySD3LatentImage", 2, True, width=1328, height=1328)
    return make.result(make.sample(model, prompts, latent, 50, 4.0, "euler", "simple"), vae)


def qwen_image_edit(name: str, info: dict) -> str:
    make = Recipe(name, info, "Qwen-Image-Edit", press="Choose the picture to change in *Load Image*. ")
    hub = "Comfy-Org/Qwen-Image-Edit_ComfyUI/resolve/main/split_files"
    model, clip, vae = qwen(make, f"{hub}/diffusion_models/qwen_image_edit_2511_bf16.safetensors")
    image = make.sheet.add("LoadImage", 0, True, image="example.png")
    image = make.sheet.add("FluxKontextImageScale", 2, True, image=image)
    kind, links = "TextEncodeQwenImageEditPlus", {"clip": clip, "vae": vae, "image1": image}
    wish = "Make it winter: snow on every surface, low sun, long shadows"
    prompts = [
        make.sheet.add(kind, 1, True, title="What to change", **links, prompt=wish),
        make.sheet.add(kind, 1, True, title="Negative prompt", **links, prompt=""),
    ]
    latent = make.sheet.add("VAEEncode", 2, True, pixels=image, vae=vae)
    return make.result(make.sample(model, prompts, latent, 40, 4.0, "euler", "simple"), vae)


def lightricks(make: Recipe, model: list, prompts: list[list], latent: list, *, steps: int, cfg: float, fps: float) -> list:
    """The sampler of LTX: its own schedule, which follows the number of tokens."""
    titled = make.sheet.add("LTXVConditioning", 2, True, positive=prompts[0], negative=prompts[1], frame_rate=fps)
    guider = make.sheet.add("CFGGuider", 3, model=model, positive=titled, negative=[titled[0], 1], cfg=cfg)
    noise = make.sheet.add("RandomNoise", 3, noise_seed=20261)
    sigmas = make.sheet.add("LTXVScheduler", 3, True, latent=latent, steps=steps)
    sampler = make.sheet.add("KSamplerSelect", 3, True, sampler_name="euler")
    links = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas, "latent_image": latent}
    return make.sheet.add("SamplerCustomAdvanced", 4, **links)


def ltx_video(name: str, info: dict) -> str:
    make = Recipe(name, info, "LTX-Video text to video", cache=0.05, video=True)
    file = File(f"{HUB}/Lightricks/LTX-Video/resolve/main/ltxv-13b-0.9.8-dev-fp8.safetensors", "checkpoints")
    loader = make.sheet.add("CheckpointLoaderSimple", 0, ckpt_name=file)
    model = make.accelerated(loader)
    clip = make.sheet.add("CLIPLoader", 0, True, clip_name=T5, type="ltxv")
    prompts = make.prompts(clip, FOX, POOR_VIDEO)
    latent = make.sheet.add("EmptyLTXVLatentVideo", 2, True, width=768, height=512, length=97)
    result = lightricks(make, model, prompts, latent, steps=30, cfg=3.0, fps=25.0)
    return make.result(result, [loader[0], 2], fps=25.0, column=4)


def ltx_2(name: str, info: dict) -> str:
    make = Recipe(name, info, "LTX-2 text to video with sound", press="Describe the picture and the sound. ", cache=0.05, video=True)
    file = File(f"{HUB}/Lightricks/LTX-2/resolve/main/ltx-2-19b-dev-fp8.safetensors", "checkpoints")
    loader = make.sheet.add("CheckpointLoaderSimple", 0, ckpt_name=file)
    model = make.accelerated(loader)
    text = encoder("Comfy-Org/ltx-2/resolve/main/split_files/text_encoders/gemma_3_12B_it_fp4_mixed.safetensors")
    clip = make.sheet.add("LTXAVTextEncoderLoader", 0, True, text_encoder=text, ckpt_name=file)
    audio_vae = make.sheet.add("LTXVAudioVAELoader", 0, True, ckpt_name=file)
    prompts = make.prompts(clip, f"{HARBOUR}. Sound: gulls, ropes knocking on masts, small waves.", POOR_VIDEO)
    video = make.sheet.add("EmptyLTXVLatentVideo", 2, True, width=768, height=512, length=121)
    audio = make.sheet.add("LTXVEmptyLatentAudio", 2, True, frames_number=121, frame_rate=24.0, audio_vae=audio_vae)
    latent = make.sheet.add("LTXVConcatAVLatent", 2, True, video_latent=video, audio_latent=audio)
    both = lightricks(make, model, prompts, latent, steps=20, cfg=4.0, fps=24.0)
    parts = make.sheet.add("LTXVSeparateAVLatent", 4, av_latent=both)
    sound = [parts[0], 1]
    decode = {"samples": sound, "audio_vae": audio_vae}
    return make.result(
        parts, [loader[0], 2], fps=24.0, audio=lambda: make.sheet.add("LTXVAudioVAEDecode", 4, True, **decode), column=4
    )


def sd3_5(name: str, info: dict) -> str:
    make = Recipe(name, info, "Stable Diffusion 3.5 large")
    url = f"{HUB}/Comfy-Org/stable-diffusion-3.5-fp8/resolve/main/sd3.5_large_fp8_scaled.safetensors"
    loader = make.sheet.add("CheckpointLoaderSimple", 0, ckpt_name=File(url, "checkpoints"))
    model = make.accelerated(loader)
    prompts = make.prompts([loader[0], 1], KITCHEN, POOR)
    latent = make.sheet.add("EmptySD3LatentImage", 2, True, width=1024, height=1024)
    return make.result(make.sample(model, prompts, latent, 28, 4.5, "euler", "sgm_uniform"), [loader[0], 2])


def lumina_2(name: str, info: dict) -> str:
    make = Recipe(name, info, "Lumina Image 2.0")
    url = f"{HUB}/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/all_in_one/lumina_2.safetensors"
    loader = make.sheet.add("CheckpointLoaderSimple", 0, ckpt_name=File(url, "checkpoints"))
    model = make.accelerated(make.sheet.add("ModelSamplingAuraFlow", 0, model=loader, shift=6.0))
    prompts = make.prompts([loader[0], 1], KITCHEN, POOR, kind="CLIPTextEncodeLumina2", field="user_prompt")
    latent = make.sheet.add("EmptySD3LatentImage", 2, True, width=1024, height=1024)
    return make.result(make.sample(model, prompts, latent, 25, 4.0, "res_multistep", "simple"), [loader[0], 2])


def z_image(name: str, info: dict) -> str:
    make = Recipe(name, info, "Z-Image")
    turbo = "Comfy-Org/z_image_turbo/resolve/main/split_files"
    file = diffusion("Comfy-Org/z_image/resolve/main/split_files/diffusion_models/z_image_bf16.safetensors")
    model = make.model(file, ("ModelSamplingAuraFlow", {"shift": 3.0}))
    clip = make.sheet.add("CLIPLoader", 0, True, clip_name=encoder(f"{turbo}/text_encoders/qwen_3_4b.safetensors"), type="lumina2")
    vae = make.sheet.add("VAELoader", 0, True, vae_name=decoder(f"{turbo}/vae/ae.safetensors"))
    prompts = make.prompts(clip, HARBOUR, POOR)
    latent = make.sheet.add("EmptySD3LatentImage", 2, True, width=1024, height=1024)
    return make.result(make.sample(model, prompts, latent, 30, 4.0, "res_multistep", "simple"), vae)


def hidream(name: str, info: dict) -> str:
    hub = "Comfy-Org/HiDream-I1_ComfyUI/resolve/main/split_files"
    make = Recipe(name, info, "HiDream-I1 full")
    file = diffusion(f"{hub}/diffusion_models/hidream_i1_full_fp16.safetensors")
    model = make.model(file, ("ModelSamplingSD3", {"shift": 3.0}))
    names = ("clip_l_hidream", "clip_g_hidream", "t5xxl_fp8_e4m3fn_scaled", "llama_3.1_8b_instruct_fp8_scaled")
    texts = {f"clip_name{place}": encoder(f"{hub}/text_encoders/{text}.safetensors") for place, text in enumerate(names, 1)}
    clip = make.sheet.add("QuadrupleCLIPLoader", 0, True, **texts)
    vae = make.sheet.add("VAELoader", 0, True, vae_name=decoder(f"{hub}/vae/ae.safetensors"))
    prompts = make.prompts(clip, KITCHEN, POOR)
    latent = make.sheet.add("EmptySD3LatentImage", 2, True, width=1024, height=1024)
    return make.result(make.sample(model, prompts, latent, 50, 5.0, "uni_pc", "simple"), vae)


def cosmos_predict2(name: str, info: dict) -> str:
    make = Recipe(name, info, "Cosmos-Predict2 text to image")
    model = make.model(diffusion("Comfy-Org/Cosmos_Predict2_repackaged/resolve/main/cosmos_predict2_2B_t2i.safetensors"))
    hub = "comfyanonymous/cosmos_1.0_text_encoder_and_VAE_ComfyUI/resolve/main"
    text = encoder(f"{hub}/text_encoders/oldt5_xxl_fp8_e4m3fn_scaled.safetensors")
    clip = make.sheet.add("CLIPLoader", 0, True, clip_name=text, type="cosmos")
    file = decoder("Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/vae/wan_2.1_vae.safetensors")
    vae = make.sheet.add("VAELoader", 0, True, vae_name=file)
    prompts = make.prompts(clip, HARBOUR, POOR)
    latent = make.sheet.add("EmptySD3LatentImage", 2, True, width=1024, height=1024)
    return make.result(make.sample(model, prompts, latent, 35, 4.0, "euler", "simple"), vae)


def chroma(name: str, info: dict) -> str:
    make = Recipe(name, info, "Chroma1-HD")
    file = diffusion("lodestones/Chroma1-HD/resolve/main/Chroma1-HD.safetensors")
    model = make.model(file, ("ModelSamplingAuraFlow", {"shift": 1.0}))
    clip = make.sheet.add("CLIPLoader", 0, True, clip_name=T5, type="chroma")
    vae = make.sheet.add("VAELoader", 0, True, vae_name=AE)
    prompts = make.prompts(clip, KITCHEN, POOR)
    latent = make.sheet.add("EmptySD3LatentImage", 2, True, width=1024, height=1024)
    return make.result(make.sample(model, prompts, latent, 30, 3.8, "euler", "beta"), vae)


def kandinsky_5(name: str, info: dict) -> str:
    hub = "Comfy-Org/HunyuanVideo_1.5_repackaged/resolve/main/split_files"
    make = Recipe(name, info, "Kandinsky 5 lite text to video", cache=0.05, video=True)
    file = diffusion("kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s/resolve/main/model/kandinsky5lite_t2v_sft_5s.safetensors")
    model = make.model(file, ("ModelSamplingSD3", {"shift": 5.0}))
    texts = {"clip_name1": encoder(f"{hub}/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors")}
    texts["clip_name2"] = File(f"{FLUX_TEXT}/clip_l.safetensors", "text_encoders")
    clip = make.sheet.add("DualCLIPLoader", 0, True, **texts, type="kandinsky5")
    file = decoder("Comfy-Org/HunyuanVideo_repackaged/resolve/main/split_files/vae/hunyuan_video_vae_bf16.safetensors")
    vae = make.sheet.add("VAELoader", 0, True, vae_name=file)
    prompts = make.prompts(clip, FOX, POOR_VIDEO)
    latent = make.sheet.add("EmptyHunyuanLatentVideo", 2, True, width=768, height=512, length=121)
    return make.result(make.sample(model, prompts, latent, 50, 5.0, "euler", "beta"), vae, fps=24.0)


def omnigen2(name: str, info: dict) -> str:
    hub = "Comfy-Org/Omnigen2_ComfyUI_repackaged/resolve/main/split_files"
    make = Recipe(name, info, "OmniGen2 text to image")
    model = make.model(diffusion(f"{hub}/diffusion_models/omnigen2_fp16.safetensors"))
    clip = make.sheet.add(
        "CLIPLoader", 0, True, clip_name=encoder(f"{hub}/text_encoders/qwen_2.5_vl_fp16.safetensors"), type="omnigen2"
    )
    vae = make.sheet.add("VAELoader", 0, True, vae_name=AE)
    prompts = make.prompts(clip, KITCHEN, POOR)
    latent = make.sheet.add("EmptySD3LatentImage", 2, True, width=1024, height=1024)
    return make.result(make.sample(model, prompts, latent, 20, 5.0, "euler", "simple"), vae)


def krea_2(name: str, info: dict) -> str:
    hub = "Comfy-Org/Krea-2/resolve/main"
    make = Recipe(name, info, "Krea 2 Turbo", cache=0.0)
    model = make.model(diffusion(f"{hub}/diffusion_models/krea2_turbo_fp8_scaled.safetensors"))
    clip = make.sheet.add("CLIPLoader", 0, True, clip_name=encoder(f"{hub}/text_encoders/qwen3vl_4b_fp8_scaled.safetensors"), type="krea2")
    vae = make.sheet.add("VAELoader", 0, True, vae_name=decoder(f"{hub}/vae/qwen_image_vae.safetensors"))
    prompts = make.prompts(clip, HARBOUR, None)
    latent = make.sheet.add("EmptySD3LatentImage", 2, True, width=1024, height=1024)
    return make.result(make.sample(model, prompts, latent, 8, 1.0, "euler", "simple"), vae)


RECIPES: tuple[Callable[[str, dict], str], ...] = (
    *(hunyuan_video, mochi, cogvideox, minimax_h3, qwen_image, qwen_image_edit, ltx_video, ltx_2),
    *(sd3_5, lumina_2, z_image, hidream, cosmos_predict2, chroma, kandinsky_5, omnigen2, krea_2, accelerate_flux),
)


def main() -> None:
    from env.server import Server

    with Server() as server:
        info = server.get("/object_info")
    folder = ROOT / "workflows"
    for recipe in RECIPES:
        path = folder / f"{recipe.__name__}.json"
        path.write_text(recipe(recipe.__name__, info), encoding="utf-8")
        thumbnail.draw(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".jpg"))
    graphs = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    stock_nodes.write(info, {node["type"] for graph in graphs for node in graph["nodes"]})


if __name__ == "__main__":
    main()
