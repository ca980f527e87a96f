"""Writes the random weights of a case to a safetensors file, tensor by tensor.

    python weights_file.py CASE PATH FLAGS...    in a process of its own, with these flags of ComfyUI

Under dynamic VRAM ComfyUI's models have no weights before a file is read, so the process that measures cannot make one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sizes import Case

HERE = Path(__file__).resolve().parent
TYPES = {"torch.bfloat16": "BF16", "torch.float32": "F32"}


def make(name: str, path: Path) -> None:
    """Write the file of the case ``name`` in another process."""
    call = [sys.executable, __file__, name, str(path), "--disable-dynamic-vram"]
    subprocess.run(call, check=True)


def write(case: Case, path: Path) -> None:
    """Normal weights of deviation 0.02, made on ComfyUI's device, under the names of a diffusion model's file."""
    import cases
    import comfy.model_management
    import torch

    device = comfy.model_management.get_torch_device()
    generator = torch.Generator(device).manual_seed(0)
    parameters = dict(cases.base_model(case, torch.device("meta")).diffusion_model.named_parameters())
    table, end = {}, 0
    for name, parameter in parameters.items():
        start, end = end, end + parameter.numel() * parameter.dtype.itemsize
        table[name] = {"dtype": TYPES[str(parameter.dtype)], "shape": list(parameter.shape), "data_offsets": [start, end]}
    head = json.dumps(table).encode()
    head += b" " * (-len(head) % 8)
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for parameter in parameters.values():
            made = torch.empty(parameter.shape, dtype=parameter.dtype, device=device).normal_(std=0.02, generator=generator)
            file.write(memoryview(made.cpu().flatten().view(torch.uint8).numpy()))
    new.rename(path)


if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
    from env import comfy_import

    comfy_import.boot_comfy(sys.argv[3:])
    from sizes import CASES

    write(CASES[sys.argv[1]], Path(sys.argv[2]))
