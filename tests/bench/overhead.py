"""Fixed costs: hooks and header per step, bytes an attention call sends."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import comfy.ops
import torch
from comfy.ldm.wan.model import WanModel

from para_core.attention.choice import Chooser
from para_core.execution.runner import Runner
from para_core.group.codec import encode, pack
from para_core.plans import wan
from para_core.sequence.mesh import Mesh
from para_core.sequence.solo import SOLO_MESH, Solo

BLOCKS = 30


def model(dim: int = 128) -> WanModel:
    """A 30-block Wan so narrow that Python, not arithmetic, takes the time."""
    torch.manual_seed(0)
    settings = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}
    found = WanModel(model_type="t2v", dim=dim, ffn_dim=dim, freq_dim=64, text_dim=64, num_heads=1, num_layers=BLOCKS, **settings)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return found.requires_grad_(False).eval()


def inputs(height: int = 8) -> tuple[tuple, dict]:
    return (torch.randn(1, 16, 1, height, 8), torch.tensor([500.0]), torch.randn(1, 8, 64)), {"transformer_options": {}}


def alternate(one: Callable[[], object], other: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median milliseconds of two functions, run in turns so that both see the same machine."""
    times: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for _ in range(repeats + 3):
            for function, seconds in zip((one, other), times, strict=True):
                start = time.perf_counter()
                function()
                seconds.append(time.perf_counter() - start)
    stock, hooked = (statistics.median(seconds[3:]) * 1e3 for seconds in times)
    return stock, hooked


def hooks(repeats: int) -> dict[str, object]:
    """Milliseconds that hooks and override add to a forward: medians of alternating runs."""
    found, (args, kwargs) = model(), inputs()
    runner = Runner(wan.PLAN, found, Chooser(None), cached=False)
    names = ["x", "timestep", "context"]
    hooked_kwargs = {"transformer_options": {"optimized_attention_override": runner.override}}
    stock, hooked = alternate(
        lambda: found(*args, **kwargs), lambda: runner.run(found, names, args, dict(hooked_kwargs), mesh=SOLO_MESH), repeats
    )
    runner.remove()
    return {"measure": f"hooks on {BLOCKS} blocks", "stock_ms": round(stock, 2), "added_ms": round(hooked - stock, 3)}


class Mute(Solo):
    """Rank 0 of two without the other: everything is packed and unpacked, nothing travels."""

    size = 2

    def all_to_all(self, received, sent, received_sizes, sent_sizes) -> None:
        own = min(received_sizes[0], sent_sizes[0])
        received[:own] = sent[:own]
        received[received_sizes[0] :] = 0


def cutting(repeats: int) -> dict[str, object]:
    """Milliseconds by which half a cut forward exceeds a stock forward of half the tokens: cutting, packing, gathering."""
    found, (whole, _), (half, kwargs) = model(), inputs(), inputs(height=4)
    runner = Runner(wan.PLAN, found, Chooser(None), cached=False)
    hooked_kwargs = {"transformer_options": {"optimized_attention_override": runner.override}}
    mesh, names = Mesh(Mute(), Mute(), Solo()), ["x", "timestep", "context"]
    stock, cut = alternate(lambda: found(*half, **kwargs), lambda: runner.run(found, names, whole, dict(hooked_kwargs), mesh=mesh), repeats)
    runner.remove()
    return {"measure": f"cutting {BLOCKS} blocks for 2 ranks", "stock_half_ms": round(stock, 2), "added_ms": round(cut - stock, 3)}


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


def measure(*, quick: bool) -> list[dict[str, object]]:
    import traffic

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        repeats = 5 if quick else 100
        rows = [hooks(repeats), cutting(repeats), header(20 if quick else 1000)]
    finally:
        torch.set_num_threads(threads)
    return rows + traffic.measure()
