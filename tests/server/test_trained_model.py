"""The small trained model in tests/assets: stock loaders take it, and it draws what the prompt names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from assets import glyphs, networks, prompts
from env import graphs
from env.fewer_threads import one_thread
from env.server import Server
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["one_thread"]
MIB = 2**20
RIGHT = 0.07  # mean distance of colours (0..1) between a blurred picture and its reference; measured: 0.03 to 0.057


@pytest.fixture(scope="module")
def model(comfy: None) -> Any:
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(prompts.FOLDER / prompts.FLUX_FILE))


@pytest.fixture(scope="module")
def vae(comfy: None) -> Any:
    import comfy.sd
    import comfy.utils

    tensors, metadata = comfy.utils.load_torch_file(str(prompts.FOLDER / prompts.VAE_FILE), return_metadata=True)
    loaded = comfy.sd.VAE(sd=tensors, metadata=metadata)
    loaded.throw_exception_if_invalid()
    return loaded


@pytest.fixture(scope="module")
def words() -> prompts.Words:
    return prompts.Words()


@pytest.fixture(scope="module")
def draw(model: Any, vae: Any, words: prompts.Words) -> Callable[..., Tensor]:
    """Pictures [B, 3, 128, 128] of names on white."""

    def pictures(names: tuple[str, ...], *, cfg: float, patched: Any = model) -> Tensor:
        import comfy.sample

        encoded = [words(f"{name} on white") for name in names]
        positive = [[torch.cat([c for c, _ in encoded]), {"pooled_output": torch.cat([p for _, p in encoded])}]]
        negative = words.conditioning("")
        noise = torch.randn(len(names), 16, 16, 16, generator=torch.Generator().manual_seed(5))
        with torch.inference_mode():
            latent = comfy.sample.sample(
                patched,
                noise,
                20,
                cfg,
                "euler",
                "simple",
                positive,
                negative,
                latent_image=torch.zeros_like(noise),
                disable_pbar=True,
                seed=5,
            )
            return vae.decode(latent).movedim(-1, 1)

    return pictures


def references() -> Tensor:
    """[R, 3, 128, 128]"""
    sheet = torch.from_numpy(np.array(Image.open(prompts.FOLDER / "references.png"))).float() / 255
    return torch.stack(sheet.split(glyphs.SIZE, 1)).movedim(-1, 1)


def distances(pictures: Tensor) -> Tensor:
    """Mean distance [B, R] of every picture from every reference. Blurred: the model puts things where it likes, nearly."""
    blurred, expected = (F.avg_pool2d(one, 16, 8) for one in (pictures, references()))
    return (blurred[:, None] - expected[None]).abs().mean((2, 3, 4))


def test_all_files_together_stay_small() -> None:
    files = {path.name: path.stat().st_size for path in prompts.FOLDER.iterdir() if path.is_file()}
    assert {prompts.FLUX_FILE, prompts.VAE_FILE, prompts.WORDS_FILE, "train.py", "README.md"} <= set(files)
    assert sum(files.values()) <= 24 * MIB


def test_the_training_networks_compute_what_comfyui_computes(model: Any, vae: Any, words: prompts.Words) -> None:
    import comfy.model_management

    flux = networks.Flux(prompts.CONTEXT, prompts.POOLED)
    flux.load_state_dict(load_file(prompts.FOLDER / prompts.FLUX_FILE))
    autoencoder = networks.Autoencoder()
    tensors = load_file(prompts.FOLDER / prompts.VAE_FILE)
    autoencoder.load_state_dict({name: tensor for name, tensor in tensors.items() if name.startswith("taesd")})
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(2, 16, 10, 14, generator=generator)
    times = torch.tensor([0.9, 0.3])
    context, pooled = (torch.cat(pair) for pair in zip(words("red apple on blue"), words(""), strict=True))
    picture = torch.rand(1, 64, 96, 3, generator=generator)
    with torch.inference_mode():
        ours, theirs = flux(latent, times, context, pooled), model.model.diffusion_model(latent, times, context, pooled)
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()
        encoded = model.model.process_latent_in(vae.encode(picture))
        assert torch.allclose(encoded, autoencoder.encode(picture.movedim(-1, 1)), atol=1e-4)
        decoded = autoencoder.decode(encoded).clamp(0, 1).movedim(1, -1)
        assert torch.allclose(vae.decode(model.model.process_latent_out(encoded)), decoded, atol=1e-4)


def test_the_autoencoder_gives_pictures_back(vae: Any) -> None:
    pictures = references().movedim(1, -1)
    error = F.mse_loss(vae.decode(vae.encode(pictures)), pictures)
    assert -10 * error.log10() > 25


def are_right(pictures: Tensor) -> bool:
    """Every picture, of the first references in order, is nearest to its own and near to it."""
    found = distances(pictures)
    return found.argmin(1).tolist() == list(range(len(found))) and bool(found.diagonal().max() < RIGHT)


@pytest.mark.parametrize(("cfg", "count"), [(1.0, len(prompts.REFERENCES)), (4.0, 4)])
def test_each_prompt_gives_a_picture_of_what_it_names(draw: Callable[..., Tensor], cfg: float, count: int) -> None:
    assert are_right(draw(prompts.REFERENCES[:count], cfg=cfg))


def test_a_model_without_one_of_its_blocks_fails_that_comparison(model: Any, draw: Callable[..., Tensor]) -> None:
    broken = model.clone()
    name = "diffusion_model.single_blocks.1.linear2.weight"
    weight = model.model.state_dict()[name]
    assert broken.add_patches({name: ("diff", (-weight.clone(),))}) == [name]
    assert not are_right(draw(prompts.REFERENCES[:3], cfg=1.0, patched=broken))


def test_background_and_unknown_words(words: prompts.Words) -> None:
    assert prompts.words("Red apple on BLUE") == ["red", "apple", "on blue"]
    assert prompts.words("meat on bone") == ["meat", "on", "bone"]
    for one, same in (("apple red", "red apple"), ("red unheard apple", "red apple"), ("unheard", "")):
        assert torch.allclose(words(one)[1], words(same)[1])
    assert not torch.allclose(words("red apple")[1], words("red apple on blue")[1])
    assert len(words.names) > 900
    for name in words.names:
        assert len(prompts.words(f"{name} on blue")) <= prompts.TOKENS


def test_the_graph_of_the_demo_draws_it_on_the_server(server: Server) -> None:
    assert prompts.FLUX_FILE in server.object_info("UNETLoader")["input"]["required"]["unet_name"][0]
    sampling = graphs.Sampling(steps=20, cfg=2.0, seed=3)
    result = server.run(graphs.emoji("panda on white", sampling=sampling)).check()
    picture = torch.from_numpy(np.array(Image.open(result.images()[0]))).float().movedim(-1, 0) / 255
    found = distances(picture[None])[0]
    assert found.argmin() == prompts.REFERENCES.index("panda")
    assert found.min() < RIGHT
