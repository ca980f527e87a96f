"""What the quality measurement samples with: a model, its decoder and its prompts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from quality_ways import Setting

LATENT = (1, 16, 16, 16)


@dataclass(frozen=True)
class Pictures:
    """A ModelPatcher, a VAE, and the conditioning of each prompt. `name` and `digest` say which weights."""

    model: Any
    vae: Any
    prompts: dict[str, list]
    empty: list
    name: str
    digest: str

    def sample(self, model: Any, setting: Setting, prompt: str, seed: int) -> torch.Tensor:
        """The latent that KSampler makes of one prompt, float32 (1, 16, 16, 16)."""
        import comfy.sample

        empty = torch.zeros(LATENT)
        noise = comfy.sample.prepare_noise(empty, seed)
        with torch.inference_mode():
            return comfy.sample.sample(
                model, noise, setting.sampled, setting.cfg, setting.sampler, setting.scheduler, self.prompts[prompt], self.empty,
                empty, disable_pbar=True, seed=seed,
            ).float()  # fmt: skip

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Pixels (H, W, 3) in 0..1."""
        with torch.inference_mode():
            return self.vae.decode(latent)[0].clamp(0, 1)


def load() -> Pictures:
    """The trained model of tests/assets. Every second prompt names a background, the others leave it to the seed."""
    import comfy.sd
    import comfy.utils
    from assets import prompts

    words = prompts.Words()
    colours = list(prompts.BACKGROUNDS)
    texts = [name if index % 2 else f"{name} on {colours[index // 2 % len(colours)]}" for index, name in enumerate(words.names)]
    vae, metadata = comfy.utils.load_torch_file(str(prompts.FOLDER / prompts.VAE_FILE), return_metadata=True)
    files = (prompts.FLUX_FILE, prompts.VAE_FILE, prompts.WORDS_FILE)
    digest = hashlib.sha256(b"".join((prompts.FOLDER / file).read_bytes() for file in files)).hexdigest()[:12]
    return Pictures(
        comfy.sd.load_diffusion_model(str(prompts.FOLDER / prompts.FLUX_FILE)),
        comfy.sd.VAE(sd=vae, metadata=metadata),
        {text: words.conditioning(text) for text in texts},
        words.conditioning(""),
        f"the trained emoji model of tests/assets ({digest})",
        digest,
    )
