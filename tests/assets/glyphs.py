"""Pictures to train on: emoji of a colour bitmap font, put on plain backgrounds, with their names."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .prompts import BACKGROUNDS, words

BITMAP = 136  # pixels of the font's bitmaps, and of the squares here
FONT_SIZE = 109  # the one size in which the bitmaps exist
SIZE = 128  # pixels of a picture
SCALES = (0.80, 0.92)  # of a bitmap in a picture
SHIFT = 0.04  # largest, of the picture's side
# Left out: pictures that differ by little from each other, and those with much small detail. A small model draws the
# rest better without them.
GROUPS_LEFT_OUT = ("People & Body", "Symbols", "Flags")
SUBGROUPS_LEFT_OUT = ("time", "place-building", "place-religious", "place-other")


def read_names(emoji_test: Path) -> dict[str, str]:
    """Name -> character of each emoji used that is one code point, in the order of Unicode's emoji-test.txt.

    A name whose words another name has had is left out: the order of words does not count.
    """
    names: dict[str, str] = {}
    seen: set[frozenset[str]] = set()
    left_out = group_left_out = False
    for line in emoji_test.read_text(encoding="utf-8").splitlines():
        title, _, value = line.partition(": ")
        if title == "# group":
            group_left_out = value in GROUPS_LEFT_OUT
        elif title == "# subgroup":
            left_out = group_left_out or value in SUBGROUPS_LEFT_OUT
        if left_out:
            continue
        match = re.match(r"([0-9A-F ]+?) *; fully-qualified *# \S+ E[\d.]+ (.+)", line)
        if match is None:
            continue
        points = [int(point, 16) for point in match[1].split() if point != "FE0F"]
        key = frozenset(words(match[2]))
        if len(points) == 1 and key not in seen:
            names[match[2]] = chr(points[0])
            seen.add(key)
    return names


def draw(font: Path, characters: list[str]) -> Tensor:
    """Premultiplied RGBA [N, 4, BITMAP, BITMAP], uint8."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    face = ImageFont.truetype(str(font), FONT_SIZE)
    pictures = []
    for character in characters:
        image = Image.new("RGBA", (BITMAP, BITMAP))
        ImageDraw.Draw(image).text((0, (BITMAP - 128) // 2), character, font=face, embedded_color=True)
        pictures.append(torch.from_numpy(np.array(image.convert("RGBa"))))
    return torch.stack(pictures).permute(0, 3, 1, 2).contiguous()


def palette() -> Tensor:
    """Background colours [12, 3] in 0..1."""
    return torch.tensor(list(BACKGROUNDS.values())) / 255


def place(glyphs: Tensor, scale: Tensor, shift: Tensor, background: Tensor) -> Tensor:
    """Pictures [B, 3, SIZE, SIZE] in 0..1 of premultiplied glyphs [B, 4, BITMAP, BITMAP] in 0..1.

    scale [B] of the bitmap; shift [B, 2] (right, down) as a share of the side; background [B, 3] in 0..1.
    """
    zoom = SIZE / BITMAP / scale
    matrix = torch.zeros(len(glyphs), 2, 3, device=glyphs.device)
    matrix[:, 0, 0] = matrix[:, 1, 1] = zoom
    matrix[:, :, 2] = -2 * shift * zoom[:, None]
    grid = F.affine_grid(matrix, [len(glyphs), 4, SIZE, SIZE], align_corners=False)
    drawn = F.grid_sample(glyphs, grid, align_corners=False)
    return (drawn[:, :3] + (1 - drawn[:, 3:]) * background[:, :, None, None]).clamp(0, 1)


def vary(glyphs: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures of glyphs [B, 4, BITMAP, BITMAP] uint8 with random size, place and background; and the background's number."""
    count, device = len(glyphs), glyphs.device
    scale = torch.empty(count, device=device).uniform_(*SCALES, generator=generator)
    shift = torch.empty(count, 2, device=device).uniform_(-SHIFT, SHIFT, generator=generator)
    colour = torch.randint(len(BACKGROUNDS), (count,), device=device, generator=generator)
    return place(glyphs.float() / 255, scale, shift, palette().to(device)[colour]), colour
