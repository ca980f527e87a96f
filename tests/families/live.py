"""Live memory of a forward at a model's real size: on the meta device, which has shapes and lifetimes but no data.

Bytes of all tensors that live at once, of one rank whose peers send nothing. A kernel's own scratch memory is not seen, and
attention is taken to need its output alone, as flash attention does.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from para_core.attention.exchange import PLAIN, Way
from para_core.execution.override import AttentionOverride
from para_core.plans import plan_for
from para_core.sequence.hooks import Forward, Hooks, StackDone
from para_core.sequence.mesh import Mesh

from .tiny.common import fields

Sized = tuple[torch.nn.Module, dict[str, Any]]


class Live(TorchDispatchMode):
    """Counts the bytes of what is made inside and still lives; ``peak``: the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and (storage := leaf.untyped_storage())._cdata not in self._known:
                key, size = storage._cdata, storage.nbytes()
                self._known.add(key)
                self.now += size
                weakref.finalize(storage, self._gone, key, size)
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class Silent:
    """A communicator whose collectives do nothing."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size

    def all_to_all(self, *_args) -> None: ...
    def start_all_to_all(self, *_args, **_options) -> Callable[[], None]:
        return lambda: None

    def all_reduce(self, *_args) -> None: ...
    def broadcast(self, *_args) -> None: ...
    def settle(self) -> None: ...
    def shift(self, *_args) -> Callable[[], None]:
        return lambda: None


class Output:
    """A kernel, and the choice of it: makes its output and nothing else."""

    setting, previous, has_lse = "output", None, True

    def kernel(self, _call) -> Output:
        return self

    def run(self, q, k, v, *, mask, scale):
        return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)

    def run_lse(self, q, k, v, *, mask, scale):
        return self.run(q, k, v, mask=mask, scale=scale), q.new_empty(q.shape[:3], dtype=torch.float32)


def mesh(ring: int, ulysses: int, rank: int = 0, speeds: tuple[float, ...] | None = None) -> Mesh:
    """The mesh as ``rank`` sees it."""
    return Mesh(Silent(rank, ring * ulysses), Silent(rank % ulysses, ulysses), Silent(rank // ulysses, ring), speeds)


def peak(sized: Sized, shared: Mesh, way: Way = PLAIN) -> int:
    """Most bytes alive in a forward whose attention calls travel by ``way``, beside its weights and its arguments."""
    model, call = sized[0], dict(sized[1])
    plan = plan_for(model)
    assert plan is not None
    hooks = Hooks(plan, model)
    override = AttentionOverride(Output(), hooks)
    override.ways.way = lambda *_: way
    options = {"optimized_attention_override": override}
    try:
        with torch.inference_mode(), Live() as live:
            hooks.forward = Forward(shared, plan.whole)
            try:
                model(call.pop("x"), call.pop("timestep"), **call, transformer_options=options)
            except StackDone:
                assert shared.sequence.rank
    finally:
        hooks.remove()
    return live.peak


def given(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def built(kind: type, **config: Any) -> torch.nn.Module:
    import comfy.ops

    model = kind(**config, dtype=torch.bfloat16, device="meta", operations=comfy.ops.disable_weight_init)
    return model.to("meta").eval().requires_grad_(False)


def flux(size: int = 1024, *, batch: int = 1, second: bool = False, fill: bool = False, **extra: Any) -> Sized:
    """FLUX.1, or FLUX.2 (``second``)."""
    from comfy.ldm.flux.model import Flux, FluxParams

    params: dict[str, Any] = dict(depth=2, depth_single_blocks=2, guidance_embed=True, patch_size=1 if second else 2)
    if second:
        params |= dict(in_channels=128, out_channels=128, vec_in_dim=None, context_in_dim=15360, hidden_size=6144, mlp_ratio=3.0)
        params |= dict(num_heads=48, axes_dim=[32] * 4, theta=2000, qkv_bias=False, txt_ids_dims=[3])
        params |= dict(global_modulation=True, mlp_silu_act=True, ops_bias=False)
        x = given(batch, 128, size // 16, size // 16)
    else:
        params |= dict(in_channels=96 if fill else 16, out_channels=16, vec_in_dim=768, context_in_dim=4096, hidden_size=3072)
        params |= dict(mlp_ratio=4.0, num_heads=24, axes_dim=[16, 56, 56], theta=10000, qkv_bias=True, txt_ids_dims=[])
        x = given(batch, 96 if fill else 16, size // 8, size // 8)
    model = built(Flux, image_model="flux", **fields(FluxParams, params))
    call = dict(x=x, timestep=given(batch), context=given(batch, 512, params["context_in_dim"]), guidance=given(batch))
    return model, call | dict(y=None if second else given(batch, 768)) | extra


def wan(name: str = "WanModel", *, channels: int = 16, frames: int = 21, small: bool = False, build: Any = (), **extra: Any) -> Sized:
    """Wan 14B or 1.3B, 832 x 480."""
    import comfy.ldm.wan.model

    sizes = dict(dim=1536, ffn_dim=8960, num_heads=12) if small else dict(dim=5120, ffn_dim=13824, num_heads=40)
    config = dict(in_dim=channels, freq_dim=256, text_dim=4096, out_dim=16, num_layers=2, text_len=512) | sizes | dict(build)
    call = dict(x=given(1, channels, frames, 60, 104), timestep=given(1), context=given(1, 512, 4096))
    return built(getattr(comfy.ldm.wan.model, name), **config), call | extra


def hunyuan(*, newer: bool = False) -> Sized:
    """HunyuanVideo 1.0 at 1280 x 720, 129 frames; 1.5 at 832 x 480, 121 frames."""
    from comfy.ldm.hunyuan_video.model import HunyuanVideo, HunyuanVideoParams

    params: dict[str, Any] = dict(axes_dim=[16, 56, 56], theta=256, qkv_bias=True, mlp_ratio=4.0, meanflow=False, meanflow_sum=False)
    if newer:
        params |= dict(in_channels=65, out_channels=32, vec_in_dim=None, context_in_dim=3584, hidden_size=2048, num_heads=16, depth=3)
        params |= dict(depth_single_blocks=0, patch_size=[1, 1, 1], guidance_embed=False, byt5=True)
        params |= dict(use_cond_type_embedding=True, vision_in_dim=1152)
        call = dict(x=given(1, 65, 31, 30, 52), context=given(1, 1000, 3584), y=None, guidance=None, txt_byt5=given(1, 256, 1472))
        call |= dict(clip_fea=given(1, 729, 1152))
    else:
        params |= dict(in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096, hidden_size=3072, num_heads=24, depth=2)
        params |= dict(depth_single_blocks=2, patch_size=[1, 2, 2], guidance_embed=True, byt5=False)
        params |= dict(use_cond_type_embedding=False, vision_in_dim=None)
        call = dict(x=given(1, 16, 33, 90, 160), context=given(1, 256, 4096), y=given(1, 768), guidance=given(1))
    return built(HunyuanVideo, image_model="hunyuan_video", **fields(HunyuanVideoParams, params)), call | dict(timestep=given(1))


def cogvideox() -> Sized:
    """CogVideoX-5B, 720 x 480, 49 frames."""
    from comfy.ldm.cogvideo.model import CogVideoXTransformer3DModel

    model = built(
        CogVideoXTransformer3DModel,
        num_attention_heads=48,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        time_embed_dim=512,
        text_embed_dim=4096,
        num_layers=2,
        sample_width=90,
        sample_height=60,
        sample_frames=49,
        patch_size=2,
        patch_size_t=None,
        max_text_seq_length=226,
        use_rotary_positional_embeddings=True,
    )
    return model, dict(x=given(1, 16, 13, 60, 90), timestep=given(1), context=given(1, 226, 4096))


def mochi() -> Sized:
    """Mochi, 848 x 480, 37 frames."""
    from comfy.ldm.genmo.joint_model.asymm_models_joint import AsymmDiTJoint

    flags = dict(learn_sigma=False, qk_norm=True, qkv_bias=False, out_bias=True, attn_drop=0.0, patch_embed_bias=True)
    flags |= dict(posenc_preserve_area=True, timestep_mlp_bias=True, attend_to_padding=False, use_t5=True, timestep_scale=1000.0)
    sizes = dict(depth=3, patch_size=2, num_heads=24, hidden_size_x=3072, hidden_size_y=1536, mlp_ratio_x=4.0, mlp_ratio_y=4.0)
    model = built(AsymmDiTJoint, in_channels=12, t5_feat_dim=4096, t5_token_length=256, rope_theta=10000.0, **flags, **sizes)
    call = dict(x=given(1, 12, 7, 60, 106), timestep=given(1), context=given(1, 256, 4096), attention_mask=given(1, 256), num_tokens=256)
    return model, call


def qwen(**extra: Any) -> Sized:
    """Qwen-Image, 1328 x 1328."""
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    sizes = dict(attention_head_dim=128, num_attention_heads=24, joint_attention_dim=3584, axes_dims_rope=(16, 56, 56))
    model = built(QwenImageTransformer2DModel, patch_size=2, in_channels=64, out_channels=16, num_layers=3, **sizes)
    return model, dict(x=given(1, 16, 1, 166, 166), timestep=given(1), context=given(1, 256, 3584)) | extra


def ltxv() -> Sized:
    """LTX-Video 2B, 768 x 512, 97 frames."""
    from comfy.ldm.lightricks.model import LTXVModel

    sizes = dict(cross_attention_dim=2048, attention_head_dim=64, num_attention_heads=32, caption_channels=4096, num_layers=3)
    model = built(LTXVModel, in_channels=128, timestep_scale_multiplier=1000.0, **sizes)
    return model, dict(x=given(1, 128, 13, 16, 24), timestep=given(1, 1), context=given(1, 128, 4096), attention_mask=None)


def predict2(frames: int = 1, height: int = 128, width: int = 128) -> Sized:
    """Cosmos-Predict2 2B."""
    from comfy.ldm.cosmos.predict2 import MiniTrainDIT

    sizes = dict(max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16, patch_spatial=2, patch_temporal=1)
    sizes |= dict(crossattn_emb_channels=1024, model_channels=2048, num_blocks=3, num_heads=16, adaln_lora_dim=256)
    flags = dict(concat_padding_mask=True, mlp_ratio=4.0, pos_emb_cls="rope3d", pos_emb_interpolation="crop", use_adaln_lora=True)
    flags |= dict(pos_emb_learnable=True, extra_per_block_abs_pos_emb=False, image_model="cosmos_predict2")
    model = built(MiniTrainDIT, **sizes, **flags)
    return model, dict(x=given(1, 16, frames, height, width), timestep=given(1), context=given(1, 512, 1024))


CASES: dict[str, Callable[[], Sized]] = {
    "flux 1024": lambda: flux(),
    "flux 2048": lambda: flux(2048),
    "flux 512, a batch of two": lambda: flux(512, batch=2),
    "flux kontext": lambda: flux(ref_latents=[given(1, 16, 128, 128)]),
    "flux fill": lambda: flux(fill=True),
    "flux2": lambda: flux(second=True),
    "hunyuan video": lambda: hunyuan(),
    "hunyuan video 1.5": lambda: hunyuan(newer=True),
    "wan 14b": lambda: wan(),
    "wan 14b image": lambda: wan(frames=1),
    "wan 14b image to video": lambda: wan(channels=36, build={"model_type": "i2v"}, clip_fea=given(1, 257, 1280)),
    "wan 1.3b": lambda: wan(small=True),
    "wan scail": lambda: wan(
        "SCAILWanModel", channels=36, reference_latent=given(1, 36, 1, 60, 104), pose_latents=given(1, 36, 21, 30, 52)
    ),
    "wan vace": lambda: wan(
        "VaceWanModel", build=dict(vace_layers=1, vace_in_dim=96), vace_context=given(1, 1, 96, 21, 60, 104), vace_strength=[1.0]
    ),
    "cogvideox": cogvideox,
    "mochi": mochi,
    "qwen image": lambda: qwen(),
    "qwen image edit": lambda: qwen(ref_latents=[given(1, 16, 1, 128, 128)], ref_latents_method="index"),
    "ltx video": ltxv,
    "cosmos predict2": lambda: predict2(),
    "cosmos predict2 video": lambda: predict2(16, 88, 160),
}
