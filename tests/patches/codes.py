"""Code of other nodes for the tests: that of core nodes where it can be built small, and rough stand-ins that mix tokens.

Every function works on all tokens at once, so that a call with a share of them gives something else.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from families.tiny.common import noise

from para_core.execution.override import OVERRIDE

__all__ = ["OVERRIDE"]
Options = dict[str, Any]


class Collector:
    """Takes the place of a ModelPatcher in a node: keeps the patches that it sets."""

    def __init__(self) -> None:
        self.patches: dict[str, list] = {}

    def clone(self) -> Collector:
        return self

    def disable_model_cfg1_optimization(self) -> None:
        pass

    def set_model_attn1_output_patch(self, patch: Any) -> None:
        self.patches["attn1_output_patch"] = [patch]


def nag() -> Options:
    from comfy_extras.nodes_nag import NAGuidance

    model = Collector()
    NAGuidance.execute(model, 5.0, 0.5, 1.5)
    return {"cond_or_uncond": [1, 0], "patches": model.patches}


def weighed(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Every row depends on another one, and on its own place."""
    shape = [-1 if place == dim % tensor.ndim else 1 for place in range(tensor.ndim)]
    return tensor * torch.linspace(0.5, 1.5, tensor.shape[dim]).view(shape) + 0.2 * tensor.flip(dim)


def attention_inputs(q, k, v, pe=None, attn_mask=None, extra_options=None):
    start, stop = extra_options.get("img_slice", [0, q.shape[-2]])
    q[..., start:stop, :] *= 1.1  # in place, and only the image
    return {"k": weighed(k, -2)}


def attention_inputs_3d(q, k, v, **rest):
    return {"q": weighed(q, 1), "v": weighed(v, 1)}


def attention_output(out, extra_options):
    return weighed(out, 1)


def wan_attention(args):
    return weighed(args["x"], 1) + 0.1 * weighed(args["q"], 1).flatten(2) + 0.1 * args["k"].flatten(2).flip(1)


def one_stream(args):
    return weighed(args["x"], 1)


def text_attention(q, k, v, **rest):
    return {"q": weighed(q, 1)}


def mlp(args):
    return {**args, "x": weighed(args["x"], 2)}


def between(args):
    """Like ControlNets as patches: adds to the tokens in place, and leaves entries out of what it returns."""
    image = args["img"]
    image[:, : image.shape[1] - 1] += 0.3 * image.flip(1)[:, 1:] + image.mean(1, keepdim=True)
    return args if args.get("block_index", 0) else {**args, "note": object()}


def new_text(args):
    """More tokens than before, as style references bring them."""
    more = {name: torch.cat([args[name][:, :2] * 0.5, args[name]], 1) for name in ("txt", "txt_ids")}
    return {**args, **more, "img": weighed(args["img"], 1)}


def skip(args, _extra):
    return args


def twice(args, extra):
    """Runs the block two times, the second on other tokens."""
    first = extra["original_block"](args)
    image = first["img"].clone()
    second = extra["original_block"]({**args, "img": first["img"].flip(1)})
    return {**second, "img": image + second["img"].mean(1, keepdim=True)}


def instead(args, _extra):
    return {**args, "img": weighed(args["img"], 1)}


def override(func, q, k, v, heads, mask=None, **rest):
    rows = 2 if rest.get("skip_reshape") else 1
    return func(weighed(q, rows), k, v, heads, mask=mask, **rest)


def replaced(function: Any, *indices: int, kinds: tuple[str, ...] = ("double_block",)) -> Options:
    return {"patches_replace": {"dit": {(kind, index): function for kind in kinds for index in indices}}}


def uso() -> Options:
    from comfy_extras.nodes_model_patch import UsoStyleProjectorPatch

    projector = SimpleNamespace(model=lambda image: image)
    return {"patches": {"post_input": [UsoStyleProjectorPatch(projector, noise(2, 3, 96, seed=31))]}}


VAE = SimpleNamespace(spacial_compression_encode=lambda: 8, temporal_compression_decode=lambda: 4)


def diffsynth() -> Options:
    """Qwen-Image's ControlNet of ModelPatchLoader, its network a mixture of rows."""
    from comfy_extras.nodes_model_patch import DiffSynthCnetPatch

    network = SimpleNamespace(
        additional_in_dim=0, process_input_latent_image=lambda latent: latent, control_block=lambda img, hint, _: weighed(img, 1) * hint
    )
    vae = SimpleNamespace(encode=lambda _: noise(2, 30, 96, seed=32), **vars(VAE))
    return {"patches": {"double_block": [DiffSynthCnetPatch(SimpleNamespace(model=network), vae, torch.zeros(1, 80, 112, 3), 0.3)]}}


class ZImageNetwork:
    """As many control blocks as ZImage_Control has, and its three ways to be called."""

    n_control_layers, additional_in_dim = 30, 0

    def __call__(self, txt, image, pe, vec):
        return image + txt.mean(1, keepdim=True)

    def forward_noise_refiner_block(self, index, control, img, mask, pe, vec):
        return weighed(img, 1) * 0.3, control + img

    def forward_control_block(self, index, control, img, mask, pe, vec):
        return weighed(control, 1) * 0.3, control * 0.5 + img


def z_image() -> Options:
    from comfy_extras.nodes_model_patch import ZImageControlPatch

    class Patch(ZImageControlPatch):
        def encode_latent_cond(self, control_image=None, inpaint_image=None):
            return noise(2, 35, 288, seed=33)

    patch = Patch(SimpleNamespace(model=ZImageNetwork()), VAE, torch.zeros(1, 80, 112, 3), 0.5)
    return {"patches": {"noise_refiner": [patch], "double_block": [patch]}}


def uni3c() -> Options:
    from comfy_extras.nodes_model_patch import WanUni3CCnetPatch

    class Network:
        num_layers = 2

        def process_input(self, hidden):
            return hidden.mean((1, 2)).flatten(1)[:, None, :12], None

        def forward_block(self, index, hidden, temb, freqs):
            hidden = hidden + 1
            return hidden, weighed(noise(1, 40, temb.shape[-1], seed=34 + index), 1) * hidden.mean()

    patch = WanUni3CCnetPatch(SimpleNamespace(model=Network()), None, VAE, None, 0.5, 1e9, -1.0)
    patch.prepared_render = noise(1, 4, 3, 6, 10, seed=35)
    return {"cond_or_uncond": [0], "sigmas": torch.tensor([0.7]), "patches": {"double_block": [patch]}}


def multitalk(width: int = 72, heads: int = 6, blocks: int = 4) -> Options:
    """InfiniteTalk's two speakers: the map of who speaks comes from one patch, attention to the audio from the other."""
    import comfy.ops
    from comfy.ldm.wan.model_multitalk import MultiTalkCrossAttnPatch, MultiTalkGetAttnMapPatch, SingleStreamMultiAttention
    from families.tiny.common import seeded

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm_x = torch.nn.LayerNorm(width)
            self.audio_cross_attn = SingleStreamMultiAttention(width, 24, heads, True, operations=comfy.ops.disable_weight_init)

    network = SimpleNamespace(blocks=torch.nn.ModuleList([seeded(Block()) for _ in range(blocks)]))
    masks = (torch.arange(15)[None] % 3 == torch.arange(3)[:, None]).float()
    patches = {
        "attn1_patch": [MultiTalkGetAttnMapPatch(masks)],
        "attn2_patch": [MultiTalkCrossAttnPatch(SimpleNamespace(model=network), 1.0)],
    }
    return {"audio_embeds": noise(1, 3, 4, 24, seed=36), "patches": patches}
