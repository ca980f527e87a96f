"""Fixed costs: hooks and header per step, starting the group, bytes an attention call sends."""

from __future__ import annotations

import statistics
import time

import comfy.ops
import torch
from comfy.ldm.wan.model import WanModel
from para_core.attention.choice import Chooser
from para_core.comfy import sidecars
from para_core.execution.runner import Runner
from para_core.group.codec import encode, pack
from para_core.plans import wan
from para_core.sequence.solo import SOLO_MESH

BLOCKS = 30


def model(dim: int = 128) -> WanModel:
    """A 30-block Wan so narrow that Python, not arithmetic, takes the time."""
    torch.manual_seed(0)
    settings = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}
    found = WanModel(model_type="t2v", dim=dim, ffn_dim=dim, freq_dim=64, text_dim=64, num_heads=1, num_layers=BLOCKS, **settings)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return found.requires_grad_(False).eval()


def inputs() -> tuple[tuple, dict]:
    return (torch.randn(1, 16, 1, 8, 8), torch.tensor([500.0]), torch.randn(1, 8, 64)), {"transformer_options": {}}


def hooks(repeats: int) -> dict[str, object]:
    """Milliseconds that hooks and override add to a forward: medians of alternating runs."""
    found, (args, kwargs) = model(), inputs()
    runner = Runner(wan.PLAN, found, Chooser(None), cached=False)
    names = ["x", "timestep", "context"]
    hooked_kwargs = {"transformer_options": {"optimized_attention_override": runner.override}}
    times: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for _ in range(repeats):
            start = time.perf_counter()
            found(*args, **kwargs)
            between = time.perf_counter()
            runner.run(found, names, args, hooked_kwargs, mesh=SOLO_MESH)
            times[0].append(between - start)
            times[1].append(time.perf_counter() - between)
    runner.remove()
    stock, hooked = (statistics.median(times[index][3:]) for index in (0, 1))
    return {"measure": f"hooks on {BLOCKS} blocks", "stock_ms": round(stock * 1e3, 2), "added_ms": round((hooked - stock) * 1e3, 3)}


def header(repeats: int) -> dict[str, object]:
    """Milliseconds to describe and pack one step's call."""
    args, kwargs = inputs()
    options = {"sigmas": torch.ones(1), "sample_sigmas": torch.ones(21), "cond_or_uncond": [0], "uuids": [1]}
    order = {"degrees": [1, 1, 2], "parts": [(args, {**kwargs, "transformer_options": options})], "cache": [None]}
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        _, tensors = encode(order)
        pack(tensors)
        seconds.append(time.perf_counter() - start)
    return {"measure": "header", "added_ms": round(statistics.median(seconds) * 1e3, 3)}


def start(ranks: int = 2) -> dict[str, object]:
    """Seconds from the first use to a joined group."""
    group = sidecars.group()
    began = time.perf_counter()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    devices = [f"cuda:{index}" for index in range(1, ranks)] if torch.cuda.is_available() else ["cpu"] * (ranks - 1)
    group.form(device, devices)
    return {"measure": f"group of {ranks} ready", "seconds": round(time.perf_counter() - began, 2)}


def measure(*, quick: bool) -> list[dict[str, object]]:
    import traffic

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [hooks(5 if quick else 100), header(20 if quick else 1000)]
    finally:
        torch.set_num_threads(threads)
    if not torch.cuda.is_available() or torch.cuda.device_count() > 1:
        rows.append(start())
    return rows + traffic.measure()
