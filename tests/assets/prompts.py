"""Words to conditioning for the small trained model: a table of learned vectors, one row a word.

A prompt is the name of an emoji, with a background if wanted: "red apple on blue", "octopus", "" (nothing said).
The order of words does not matter and unknown words are left out. A prompt becomes TOKENS vectors of the table's first
CONTEXT numbers, filled up with row 0, and a pooled vector: the mean of the last POOLED numbers of the words used.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent
FLUX_FILE = "emoji_flux.safetensors"
VAE_FILE = "emoji_vae.safetensors"
WORDS_FILE = "emoji_words.safetensors"
# The pictures of references.png, from left to right.
REFERENCES = (
    "grinning face",
    "red heart",
    "panda",
    "sunflower",
    "tomato",
    "parrot",
    "pool 8 ball",
    "rocket",
    "soccer ball",
    "cactus",
    "orange book",
    "cyclone",
)

TOKENS = 10
CONTEXT = 64
POOLED = 128
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (20, 20, 24),
    "grey": (150, 150, 155),
    "red": (205, 45, 45),
    "orange": (245, 150, 50),
    "yellow": (250, 220, 90),
    "green": (70, 165, 85),
    "teal": (40, 150, 160),
    "blue": (55, 95, 205),
    "sky": (165, 210, 245),
    "purple": (125, 75, 175),
    "pink": (250, 185, 205),
}


def words(prompt: str) -> list[str]:
    """The words of a prompt in lower case; a background at its end is one word, such as "on blue"."""
    found = re.findall(r"[^\W_]+", prompt.lower())
    if len(found) >= 2 and found[-2] == "on" and found[-1] in BACKGROUNDS:
        found[-2:] = [f"on {found[-1]}"]
    return list(dict.fromkeys(found))


def vocabulary(names: list[str]) -> list[str]:
    """Row names of the table: "" for no word, backgrounds, then the words of all names in order."""
    return ["", *(f"on {colour}" for colour in BACKGROUNDS), *sorted({word for name in names for word in words(name)})]


def rows(prompt: str, index: dict[str, int]) -> list[int]:
    """TOKENS row numbers of the table, 0 where there is no word."""
    known = [index[word] for word in words(prompt) if word in index][:TOKENS]
    return known + [0] * (TOKENS - len(known))


def condition(table: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Context [B, TOKENS, CONTEXT] and pooled vector [B, POOLED] for row numbers [B, TOKENS] of a table [V, CONTEXT + POOLED]."""
    vectors = table[chosen]
    used = (chosen > 0).unsqueeze(-1).to(table.dtype)
    used[:, 0] = torch.maximum(used[:, 0], 1 - used.sum(1).clamp(max=1))  # nothing said: the vector of row 0
    return vectors[..., :CONTEXT], (vectors[..., CONTEXT:] * used).sum(1) / used.sum(1)


class Words:
    """The shipped table. `names` are the emoji that the model was trained on."""

    def __init__(self, file: Path = FOLDER / WORDS_FILE) -> None:
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            self.table = opened.get_tensor("words").float()
            metadata = opened.metadata()
        self.index = {word: row for row, word in enumerate(json.loads(metadata["vocabulary"]))}
        self.names: list[str] = json.loads(metadata["names"])

    def __call__(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Context [1, TOKENS, CONTEXT] and pooled vector [1, POOLED], float32."""
        return condition(self.table, torch.tensor([rows(prompt, self.index)]))

    def conditioning(self, prompt: str) -> list:
        """The same as ComfyUI's samplers take it."""
        context, pooled = self(prompt)
        return [[context, {"pooled_output": pooled}]]
