"""Step times of other packages on models of the same size: diffusers, and cache-dit on top of it.

    python peers.py JSON                                     on one device
    python -m torch.distributed.run ... peers.py JSON        on several, tokens split by Ulysses

JSON: record, case, quick, deadline, row_limit. The weights are random too, and not those of ComfyUI's model: only times compare.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from clock import between, mark
from record import Record, Row
from rows import TimeIsUp, attempt
from sizes import CASES, Case, tiny

WARM = 3
Prepare = Callable[[torch.nn.Module], object]


def measure(record: Record, name: str, options: Namespace) -> None:
    """Rows of case ``name``, on one device and on as many as there are; each count in processes of its own."""
    if find_spec("diffusers") is None:
        print("peers: diffusers is not installed")
        return
    if not name.startswith(("flux", "wan")):
        return
    given = {key: getattr(options, key) for key in ("quick", "deadline", "row_limit")} | {"record": str(record.path), "case": name}
    there = torch.cuda.device_count() if torch.cuda.is_available() and not options.cpu else 1  # both need cards to split a model
    for count in [1, *(n for n in (2, 4, 8) if n <= there)]:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
        script = str(Path(__file__).resolve())
        environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if options.cpu else {})}
        environment.pop("PYTORCH_CUDA_ALLOC_CONF", None)  # ComfyUI's choice of an allocator
        subprocess.run([sys.executable, *launch, script, json.dumps(given)], check=False, env=environment)
    record.tables = Record.read(record.path).tables


def ways(count: int) -> dict[str, Prepare]:
    """What is done to a model before it runs, by the way's name."""
    cuda = torch.cuda.is_available()
    found: dict[str, Prepare] = {}
    if count == 1:
        found["diffusers, native"] = lambda _model: None
        if cuda:
            found["diffusers, cuDNN"] = lambda model: model.set_attention_backend("_native_cudnn")
            found["diffusers, cuDNN, compiled"] = lambda model: (
                model.set_attention_backend("_native_cudnn"),
                model.compile_repeated_blocks(fullgraph=True),
            )
        return found

    def ulysses(model: Any, backend: str) -> None:
        from diffusers import ContextParallelConfig

        model.set_attention_backend(backend)
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=count))

    def cache_dit(model: Any) -> None:
        import cache_dit

        cache_dit.enable_cache(model, parallelism_config=cache_dit.ParallelismConfig(ulysses_size=count))

    for backend, word in (("native", "native"), *((("_native_cudnn", "cuDNN"),) if cuda else ())):
        found[f"diffusers, {word}, Ulysses {count}"] = lambda model, backend=backend: ulysses(model, backend)
    if find_spec("cache_dit") is not None:
        found[f"cache-dit, Ulysses {count}"] = cache_dit
    return found


def build(name: str, case: Case, device: torch.device) -> torch.nn.Module:
    """The package's own class in the size of ``case``, weights normal with deviation 0.02."""
    from diffusers import FluxTransformer2DModel, WanTransformer3DModel

    config = case.config
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    with device:
        if name.startswith("flux"):
            model = FluxTransformer2DModel(
                num_layers=config["depth"],
                num_single_layers=config["depth_single_blocks"],
                num_attention_heads=config["num_heads"],
                guidance_embeds=True,
            )
        else:
            model = WanTransformer3DModel(
                num_layers=config["num_layers"], num_attention_heads=config["num_heads"], ffn_dim=config["ffn_dim"]
            )
    torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model.requires_grad_(False).eval()


def inputs(name: str, case: Case, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The latents as the package wants them, and what goes with them."""
    torch.manual_seed(1)
    text = torch.randn(1, *case.text, device=device, dtype=dtype)
    if name.startswith("wan"):
        return torch.randn(case.latent, device=device, dtype=dtype), {"encoder_hidden_states": text}
    rows, columns = (side // 2 for side in case.latent[2:])
    places = torch.stack(torch.meshgrid(torch.zeros(1).long(), torch.arange(rows), torch.arange(columns), indexing="ij"), -1).reshape(-1, 3)
    return torch.randn(1, rows * columns, 4 * case.latent[1], device=device, dtype=dtype), {
        "encoder_hidden_states": text,
        "pooled_projections": torch.randn(1, case.pooled, device=device, dtype=dtype),
        "img_ids": places.to(device, dtype),
        "txt_ids": torch.zeros(case.text[0], 3, device=device, dtype=dtype),
        "guidance": torch.full((1,), 3.5, device=device, dtype=dtype),
    }


def run(model: torch.nn.Module, name: str, case: Case, device: torch.device) -> Row:
    """Euler steps, as many as ComfyUI's sampler takes of the case, and timed in the same way."""
    dtype = next(model.parameters()).dtype
    latents, given = inputs(name, case, device, dtype)
    marks, launch = [], 0.0
    with torch.no_grad():
        for step in range(case.steps):
            last = step == case.steps - 1
            if last and device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            time_step = torch.full((1,), 1 - step / case.steps, device=device, dtype=dtype) * (1000 if name.startswith("wan") else 1)
            velocity = model(hidden_states=latents, timestep=time_step, return_dict=False, **given)[0]
            launch = time.perf_counter() - start
            latents = latents - velocity / case.steps
            marks.append(mark())
            if len(marks) == WARM and device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
    kept = [between(before, after) for before, after in itertools.pairwise(marks)][WARM - 1 : -1]
    return {
        "step_ms": round(statistics.median(kept) * 1e3, 2),
        "spread_ms": round((max(kept) - min(kept)) * 1e3, 2),
        "steps": len(kept),
        "launch_ms": round(launch * 1e3, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else None,
    }


@contextmanager
def follow() -> Iterator[Row]:
    """A way on another rank than the first, which writes the row: what fails, fails there too."""
    try:
        yield {}
    except Exception:  # noqa: BLE001  the next way is tried
        traceback.print_exc()


def main() -> None:
    options = Namespace(**json.loads(sys.argv[1]))
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    if count > 1:
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
    case = CASES[options.case] if cuda and not options.quick else tiny(CASES[options.case], heads=4)
    record = Record.read(Path(options.record))
    for way, prepare in ways(count).items():
        key = {"case": options.case, "way": way, "memory": "torch's own" if cuda else "CPU"}
        if record.find("peers", **key) is not None:
            continue
        with attempt(record, "peers", key, options) if rank == 0 else follow() as row:
            model = build(options.case, case, device)
            prepare(model)
            row.update(run(model, options.case, case, device))
            del model
    if count > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except TimeIsUp:
        sys.exit("peers: time is up")
