"""Train the autoencoder and the small FLUX of this folder on the emoji of a font.

    cd tests && python -m assets.train --font NotoColorEmoji.ttf --names emoji-test.txt --out FOLDER

Both trainings are given seconds, not steps: with the defaults they take less than ten minutes on one H100. State is
kept in FOLDER every half minute and taken up again by the same command. See README.md for the recipe and licences.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import glyphs, prompts
from .networks import Autoencoder, DoubleBlock, Flux, Residual, SingleBlock
from .optimizer import Optimizers

CHECKPOINT_SECONDS = 30.0
AUTOENCODER_LR = 1.5e-3
LATENT_NOISE = 0.04  # added for the decoder while the autoencoder trains: near latents give near pictures
DROP_ALL, DROP_BACKGROUND, DROP_SOME, DROP_WORD = 0.1, 0.3, 0.1, 0.4


@dataclass(frozen=True)
class Options:
    font: Path
    names: Path
    out: Path
    autoencoder_seconds: float
    flux_seconds: float
    autoencoder_batch: int
    batch: int
    variants: int  # pictures of each emoji whose latents the model sees
    limit: int  # emoji used; 0 = all
    seed: int
    lr: float
    device: torch.device


class Clock:
    """Training time used, without the time that a stopped run was away and without the first, compiling steps."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.used, self.since = seconds, 0.0, time.monotonic()

    @property
    def elapsed(self) -> float:
        return self.used + time.monotonic() - self.since

    @property
    def progress(self) -> float:
        return min(1.0, self.elapsed / self.seconds)


class Run:
    """The loop both trainings share: schedule by the clock, a log line now and then, checkpoints."""

    def __init__(self, file: Path, seconds: float, state: dict) -> None:
        """`state`: name -> object with state_dict and load_state_dict."""
        self.file, self.state, self.clock, self.step = file, state, Clock(seconds), 0
        self.saved = time.monotonic()
        if file.exists():
            kept = torch.load(file, map_location="cpu", weights_only=True)
            self.step, self.clock.used = kept["step"], kept["elapsed"]
            for name, part in state.items():
                part.load_state_dict(kept[name])
            print(f"{file.name}: taken up at step {self.step}, {self.clock.used:.0f} s", flush=True)

    def rate(self) -> float:
        """Learning rate as a share of the highest: a short rise, then a cosine down to 0."""
        return min(1.0, self.step / 100) * 0.5 * (1 + math.cos(math.pi * self.clock.progress))

    def next(self, **shown: Tensor) -> bool:
        """Count a step; False when the time is over."""
        self.step += 1
        if self.step == 5:
            self.clock.since = time.monotonic()  # compiled by now
        if self.step % 200 == 0:
            text = "  ".join(f"{name} {value.item():.5f}" for name, value in shown.items())
            print(f"{self.file.name}: step {self.step}  {self.clock.elapsed:.0f} s  {text}", flush=True)
        over = self.clock.progress >= 1
        if over or time.monotonic() - self.saved > CHECKPOINT_SECONDS:
            self.save()
        return not over

    def save(self) -> None:
        kept = {name: part.state_dict() for name, part in self.state.items()}
        partial = self.file.with_suffix(".partial")
        torch.save(kept | {"step": self.step, "elapsed": self.clock.elapsed}, partial)
        partial.replace(self.file)
        self.saved = time.monotonic()


def autocast(options: Options) -> torch.autocast:
    return torch.autocast(options.device.type, torch.bfloat16)


def compile_parts(module: nn.Module, options: Options, *kinds: type[nn.Module]) -> None:
    """Compile the repeated parts of a module, which takes a fraction of the time that the whole would."""
    for part in module.modules():
        if options.device.type == "cuda" and isinstance(part, kinds):
            part.compile(dynamic=False)


def edges(pictures: Tensor) -> Tensor:
    """Differences of neighbouring pixels in both directions, in one vector for each picture."""
    return torch.cat(((pictures[..., 1:] - pictures[..., :-1]).flatten(1), pictures.diff(dim=2).flatten(1)), 1)


def train_autoencoder(options: Options, drawn: Tensor) -> Autoencoder:
    """Absolute error of colours and of edges; latents kept near mean 0 and deviation 1 in every channel."""
    torch.manual_seed(options.seed)
    model = Autoencoder().to(options.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=AUTOENCODER_LR, betas=(0.9, 0.98), weight_decay=0.0)
    parts = {"model": model, "optimizer": optimizer}
    run = Run(options.out / "autoencoder.pt", options.autoencoder_seconds, parts)
    compile_parts(model, options, Residual)
    generator = torch.Generator(options.device).manual_seed(options.seed + run.step)
    more = run.clock.progress < 1
    while more:
        chosen = torch.randint(len(drawn), (options.autoencoder_batch,), device=options.device, generator=generator)
        pictures = glyphs.vary(drawn[chosen], generator)[0].contiguous(memory_format=torch.channels_last)
        with autocast(options):
            latents = model.encode(pictures).float()
            noise = torch.randn(latents.shape, device=options.device, generator=generator)
            decoded = model.decode(latents + LATENT_NOISE * noise).float()
        colour, edge = F.l1_loss(decoded, pictures), F.l1_loss(edges(decoded), edges(pictures))
        square = F.mse_loss(decoded, pictures)
        mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        spread = mean.square().mean() + (deviation - 1).square().mean()
        (colour + edge + square + 0.1 * spread).backward()
        for group in optimizer.param_groups:
            group["lr"] = AUTOENCODER_LR * run.rate()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        more = run.next(colour=colour, psnr=-10 * square.log10(), spread=spread)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def latent_pool(options: Options, drawn: Tensor, autoencoder: Autoencoder) -> tuple[Tensor, Tensor]:
    """Latents [N, variants, 16, h, w] in float16, and the number of each one's background [N, variants]."""
    generator = torch.Generator(options.device).manual_seed(options.seed + 1)
    latents, colours = [], []
    for chunk in torch.arange(len(drawn), device=options.device).repeat(options.variants).split(256):
        pictures, colour = glyphs.vary(drawn[chunk], generator)
        with autocast(options):
            latents.append(autoencoder.encode(pictures.contiguous(memory_format=torch.channels_last)).half().contiguous())
        colours.append(colour)
    shape = (options.variants, len(drawn))
    pool = torch.cat(latents)
    with autocast(options):
        error = F.mse_loss(autoencoder.decode(latents[-1]).clamp(0, 1), pictures)
    print(f"latents: deviation {pool.float().std():.3f}; pictures back from them: {-10 * error.log10():.2f} dB", flush=True)
    return pool.unflatten(0, shape), torch.cat(colours).unflatten(0, shape)


class Tables(nn.Module):
    """The learned words."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words = nn.Parameter(torch.randn(words, prompts.CONTEXT + prompts.POOLED))


def forget(rows: Tensor, background: Tensor, generator: torch.Generator) -> Tensor:
    """Prompts [B, TOKENS] of names' rows (last column free) and backgrounds' rows [B], with some words left out."""

    def chance(probability: float, *shape: int) -> Tensor:
        return torch.rand(shape, device=rows.device, generator=generator) < probability

    count = len(rows)
    rows = rows.masked_fill(chance(DROP_SOME, count, 1) & chance(DROP_WORD, *rows.shape), 0)
    rows[:, -1] = background.masked_fill(chance(DROP_BACKGROUND, count), 0)
    return rows.masked_fill(chance(DROP_ALL, count, 1), 0)


def train_flux(options: Options, names: list[str], pool: Tensor, colours: Tensor, words: list[str]) -> tuple[Flux, Tables]:
    """Rectified flow: the model predicts noise - latent at a random point between them."""
    torch.manual_seed(options.seed + 2)
    device = options.device
    index = {word: row for row, word in enumerate(words)}
    rows = torch.tensor([prompts.rows(name, index) for name in names], device=device)
    assert not rows[:, -1].any(), "no room for the background"
    model = Flux(prompts.CONTEXT, prompts.POOLED).to(device)
    tables = Tables(len(words)).to(device)
    optimizers = Optimizers(model, tables.words, options.lr)
    run = Run(options.out / "flux.pt", options.flux_seconds, {"model": model, "tables": tables, "optimizers": optimizers})
    compile_parts(model, options, DoubleBlock, SingleBlock)
    generator = torch.Generator(device).manual_seed(options.seed + 3 + run.step)
    more = run.clock.progress < 1
    shown = torch.zeros((), device=device)
    while more:
        picture = torch.randint(len(names), (options.batch,), device=device, generator=generator)
        variant = torch.randint(options.variants, (options.batch,), device=device, generator=generator)
        latents = pool[variant, picture].float()
        prompt = forget(rows[picture], 1 + colours[variant, picture], generator)
        noise = torch.randn(latents.shape, device=device, generator=generator)
        t = torch.sigmoid(torch.randn(options.batch, device=device, generator=generator))
        t[::4] = torch.rand(len(t[::4]), device=device, generator=generator)
        mixed = torch.lerp(latents, noise, t[:, None, None, None])
        with autocast(options):
            velocity = model(mixed, t, *prompts.condition(tables.words, prompt))
        loss = F.mse_loss(velocity.float(), noise - latents)
        loss.backward()
        optimizers.step(run.rate())
        shown = torch.lerp(shown, loss.detach(), 0.01 if run.step > 100 else 0.2)
        more = run.next(loss=shown)
    return model.eval(), tables


@torch.no_grad()
def sample(model: Flux, tables: Tables, chosen: Tensor, noise: Tensor, steps: int, cfg: float) -> Tensor:
    """Euler, as ComfyUI's KSampler does it with the scheduler "simple" and shift 1."""
    x = noise
    conditions = [prompts.condition(tables.words, rows) for rows in (chosen, torch.zeros_like(chosen))]
    times = torch.linspace(1, 0, steps + 1, device=x.device)
    for t, after in zip(times[:-1], times[1:], strict=True):
        at = t.expand(len(x))
        velocity = model(x, at, *conditions[0])
        if cfg != 1:
            without = model(x, at, *conditions[1])
            velocity = without + cfg * (velocity - without)
        x = x + (after - t) * velocity
    return x


def draw_sheet(options: Options, names: list[str], words: list[str], model: Flux, tables: Tables, autoencoder: Autoencoder) -> None:
    """samples.png: rows of pictures made with cfg 1, cfg 4, and with a background asked for."""
    from PIL import Image

    index = {word: row for row, word in enumerate(words)}
    asked = names[:: max(1, -(-len(names) // 80))][:80]
    noise = torch.randn(len(asked), 16, 16, 16, generator=torch.Generator().manual_seed(1)).to(options.device)
    sheets = []
    for suffix, cfg in (("", 1.0), (" on white", 1.0), (" on sky", 2.0), (" on yellow", 4.0)):
        rows = torch.tensor([prompts.rows(name + suffix, index) for name in asked], device=options.device)
        with autocast(options):
            pictures = autoencoder.decode(sample(model, tables, rows, noise, 25, cfg)).float().clamp(0, 1)
        columns = 20
        pictures = F.pad(pictures, (0, 0, 0, 0, 0, 0, 0, -len(pictures) % columns))
        lines = pictures.unflatten(0, (-1, columns))
        sheets.append(lines.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1))
    sheet = (torch.cat(sheets) * 255).round().byte().cpu().numpy()
    Image.fromarray(sheet).save(options.out / "samples.png")


def draw_references(options: Options, characters: dict[str, str]) -> None:
    """references.png: what the tests compare pictures with, side by side, on white."""
    from PIL import Image

    drawn = glyphs.draw(options.font, [characters[name] for name in prompts.REFERENCES]).float() / 255
    count, middle = len(drawn), sum(glyphs.SCALES) / 2
    pictures = glyphs.place(drawn, torch.full((count,), middle), torch.zeros(count, 2), torch.ones(count, 3))
    Image.fromarray((pictures.permute(2, 0, 3, 1).flatten(1, 2) * 255).round().byte().numpy()).save(options.out / "references.png")


def write(file: Path, module: nn.Module, extra: dict[str, Tensor], **metadata: str) -> None:
    from safetensors.torch import save_file

    half = {name: tensor.detach().half().contiguous().cpu() for name, tensor in module.state_dict().items()}
    save_file(half | extra, file, metadata)


def read_options() -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    fonts = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
    parser.add_argument("--font", type=Path, default=fonts)
    parser.add_argument("--names", type=Path, default=Path("/usr/share/unicode/emoji/emoji-test.txt"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--autoencoder-seconds", type=float, default=90)
    parser.add_argument("--flux-seconds", type=float, default=220)
    parser.add_argument("--autoencoder-batch", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--variants", type=int, default=64)
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return Options(**vars(parser.parse_args()))


def main() -> None:
    options = read_options()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    characters = glyphs.read_names(options.names)
    names = list(characters)[: options.limit or None]
    drawn = glyphs.draw(options.font, [characters[name] for name in names]).to(options.device)
    words = prompts.vocabulary(names)
    draw_references(options, characters)
    print(f"{len(names)} emoji, {len(words)} words, device {options.device}", flush=True)
    autoencoder = train_autoencoder(options, drawn)
    scale = {"vae_scale": torch.tensor(0.3611), "vae_shift": torch.tensor(0.1159)}  # of FLUX.1 latents in ComfyUI
    write(options.out / "emoji_vae.safetensors", autoencoder, scale)
    torch.compiler.set_stance("force_eager")  # other sizes than in training: not worth compiling
    pool, colours = latent_pool(options, drawn, autoencoder)
    torch.compiler.set_stance("default")
    model, tables = train_flux(options, names, pool, colours, words)
    write(options.out / "emoji_flux.safetensors", model, {})
    write(options.out / "emoji_words.safetensors", tables, {}, vocabulary=json.dumps(words), names=json.dumps(names))
    torch.compiler.set_stance("force_eager")
    draw_sheet(options, names, words, model, tables, autoencoder)


if __name__ == "__main__":
    main()
