"""The rows of the README's table "Patches and neighbours", and the cases that test each: one forward, or a whole run."""

from __future__ import annotations

from collections.abc import Callable

from . import codes
from .codes import Options, replaced

NAG = "Normalized Attention Guidance (`NAGuidance`)"
INSIDE = "Patches inside blocks: `attn1_patch`, `attn1_output_patch`, `attn2_patch`, `mlp_patch`"
POST_INPUT = "`post_input` patches (USO style reference)"
BETWEEN = "`double_block` patches (Qwen-Image DiffSynth ControlNet, Wan Uni3C)"
REFINER = "`noise_refiner` patches (Z-Image ControlNet)"
MULTITALK = "MultiTalk, InfiniteTalk"
SKIP = "`SkipLayerGuidanceDiT`, `SkipLayerGuidanceDiTSimple`"
REPLACED = "Other nodes that replace blocks (`patches_replace`)"
OVERRIDE = "Attention overrides of other nodes (`optimized_attention_override`)"
EASY, LAZY = "EasyCache", "LazyCache"
COMPILE = "`TorchCompileModel`, also on block lists"
SAMPLING = "`ModelSamplingFlux`, `ModelSamplingSD3` and the like"
GUIDANCE = "`RescaleCFG` and other functions before, in and after cfg"
HOOKS = "LoRA as a conditioning hook"
KV_CACHE = "Flux KV Cache (`FluxKVCache`)"
TOME = "Token Merging (`TomePatchModel`)"
TILES = "`HyperTile`"
WRITTEN = "Packs that write into the model itself, for good (`forward` methods, hooks) or for the time of a call (TeaCache, WaveSpeed)"
MULTIGPU = "MultiGPU CFG Split (`MultiGPU_WorkUnits`)"

SHARED = (NAG, INSIDE, POST_INPUT, BETWEEN, REFINER, MULTITALK, SKIP, REPLACED, OVERRIDE, EASY, LAZY, COMPILE, SAMPLING, GUIDANCE)
ALONE = (HOOKS, KV_CACHE, TOME, TILES, MULTIGPU, WRITTEN)


def patch(name: str, *functions: Callable) -> Callable[[], Options]:
    return lambda: {"patches": {name: list(functions)}}


def both(q: Callable, out: Callable) -> Callable[[], Options]:
    return lambda: {"patches": {"attn1_patch": [q], "attn1_output_patch": [out]}}


# one forward each: (row, tiny model of tests/families, transformer options)
FORWARDS: dict[str, tuple[str, str, Callable[[], Options]]] = {
    **{f"nag {family}": (NAG, family, codes.nag) for family in ("flux", "flux2", "flux kontext", "chroma", "hunyuan video", "krea 2")},
    **{
        f"attention {family}": (INSIDE, family, both(codes.attention_inputs, codes.attention_output))
        for family in ("flux", "flux control", "flux2", "chroma", "hunyuan video mask", "hunyuan video reference", "krea 2 reference")
    },
    **{
        f"attention {family}": (INSIDE, family, patch("attn1_patch", codes.attention_inputs))
        for family in ("qwen image", "qwen image edit", "qwen image mask")
    },
    **{
        f"attention {family}": (
            INSIDE,
            family,
            lambda: {"patches": {"attn1_patch": [codes.wan_attention, codes.one_stream], "attn2_patch": [codes.one_stream]}},
        )
        for family in ("wan", "wan image to video", "wan vace", "wan humo")
    },
    "attention cosmos predict2": (INSIDE, "cosmos predict2", patch("attn1_patch", codes.attention_inputs_3d)),
    "text attention cosmos predict2": (INSIDE, "cosmos predict2", patch("attn2_patch", codes.text_attention)),
    "mlp cosmos predict2": (INSIDE, "cosmos predict2", patch("mlp_patch", codes.mlp)),
    **{f"new text {family}": (POST_INPUT, family, patch("post_input", codes.new_text)) for family in ("flux", "flux2", "qwen image")},
    "uso": (POST_INPUT, "flux", codes.uso),
    **{
        f"between {family}": (BETWEEN, family, patch("double_block", codes.between, codes.between))
        for family in ("qwen image edit control", "wan", "wan reference", "wan vace", "wan s2v", "wan animate", "lumina 2")
    },
    "diffsynth": (BETWEEN, "qwen image", codes.diffsynth),
    "uni3c": (BETWEEN, "wan reference", codes.uni3c),
    "z-image controlnet": (REFINER, "z-image", codes.z_image),
    "noise refiner": (REFINER, "lumina 2", patch("noise_refiner", codes.between)),
    "multitalk": (MULTITALK, "wan with one prompt", codes.multitalk),
    **{
        f"skipped {family}": (SKIP, family, lambda: {**replaced(codes.skip, 0, 3, kinds=("double_block", "single_block"))})
        for family in ("flux", "flux control", "hunyuan video", "mochi", "sd3", "wan", "wan vace", "ltx video", "ltx 2", "minimax")
    },
    "skipped last single blocks": (SKIP, "flux2", lambda: replaced(codes.skip, 1, 2, kinds=("single_block",))),
    "skipped double blocks": (SKIP, "flux", lambda: replaced(codes.skip, 0, 1)),
    **{
        f"skipped double blocks and attention {family}": (
            SKIP,
            family,
            lambda: {**replaced(codes.skip, 0, 1, 2, 3), "patches": {"attn1_patch": [codes.attention_inputs]}},
        )
        for family in ("flux", "chroma", "hunyuan video")
    },
    "everything skipped": (SKIP, "chroma", lambda: replaced(codes.skip, 0, 1, 2, kinds=("double_block", "single_block"))),
    **{
        f"twice {family}": (REPLACED, family, lambda: replaced(codes.twice, 0, 1, 2, 3))
        for family in (
            "flux",
            "flux control",
            "flux2",
            "chroma",
            "hunyuan video mask",
            "mochi",
            "sd3.5 medium",
            "qwen image",
            "wan",
            "ltx video",
        )
    },
    "instead of the last": (REPLACED, "wan", lambda: replaced(codes.instead, 3)),
    "replaced and patched": (
        REPLACED,
        "wan",
        lambda: {**replaced(codes.twice, 0, 3), "patches": {"double_block": [codes.between], "attn1_patch": [codes.one_stream]}},
    ),
    **{
        f"override {family}": (OVERRIDE, family, lambda: {codes.OVERRIDE: codes.override})
        for family in (
            "flux",
            "flux mask",
            "hunyuan video mask",
            "mochi short text",
            "cogvideox",
            "wan image to video",
            "wan vace",
            "kandinsky 5",
            "wan animate",
            "qwen image mask",
            "sd3.5 medium",
            "z-image",
            "hidream",
            "ltx video mask",
            "cosmos predict2",
            "minimax",
            "krea 2",
        )
    },
    "override and patches": (
        OVERRIDE,
        "wan",
        lambda: {codes.OVERRIDE: codes.override, "patches": {"double_block": [codes.between], "attn1_patch": [codes.one_stream]}},
    ),
}

# whole runs, in tests/patches/test_runs.py and test_alone.py
RUNS: dict[str, str] = {
    "written": WRITTEN,
    "nag": NAG,
    "nag, batch degree asked for": NAG,
    "nag on 3": NAG,
    "attention of wan": INSIDE,
    "new text": POST_INPUT,
    "between blocks of wan": BETWEEN,
    "skip layers": SKIP,
    "skip the last block": SKIP,
    "skip for the negative prompt": SKIP,
    "skip on 3": SKIP,
    "blocks run twice": REPLACED,
    "override": OVERRIDE,
    "override on wan": OVERRIDE,
    "override on 3": OVERRIDE,
    "easycache": EASY,
    "easycache, prompts of two lengths": EASY,
    "easycache that skips all it may": EASY,
    "lazycache": LAZY,
    "torch.compile of the model": COMPILE,
    "torch.compile of blocks, prompts of two lengths": COMPILE,
    "sampling of flux": SAMPLING,
    "sampling of wan": SAMPLING,
    "rescaled cfg": GUIDANCE,
    "functions before and after cfg": GUIDANCE,
    "hooks": HOOKS,
    "kv cache": KV_CACHE,
    "tome": TOME,
    "hypertile": TILES,
    "multigpu": MULTIGPU,
}
