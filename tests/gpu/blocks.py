"""Compiled blocks that two ranks share, their MLP computed beside the exchange: a part of ``exchange.py``, run by it as ``blocks``.

FLUX and FLUX.2 of a few blocks. Each forward has other latents, so that a replay of a graph which reads what an earlier one left
would show.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from time import perf_counter

import torch

from para_core.group.communicator import Communicator, Meshes
from para_core.sequence.mesh import Degrees, Mesh

NAME = "blocks"
HEAD = f"{'model':9}{'dtype':10}{'blocks':14}{'graph':7}{'stock':9}{'error':9}{'replays':9}{'ms':9}ok"
NAMES = ["x", "timestep", "context", "y", "guidance"]
FORWARDS = 4


def rows(comm: Communicator, device: torch.device, *, cpu: bool, timed: bool) -> Iterator[str]:
    """The table's rows, rank 0's of use. ``timed``: the ranks have a card each."""
    from env.comfy_import import boot_comfy

    boot_comfy(["--cpu"] if cpu else [])
    mesh = Meshes(comm).mesh(Degrees(ulysses=2))
    assert mesh is not None
    for name in ("flux", "flux2"):
        calls = inputs(name, device, cpu=cpu)
        exact = plain(model(name, device, torch.float32, cpu=cpu), calls) if not comm.rank else []
        for dtype in (torch.float32,) if cpu else (torch.float32, torch.bfloat16):
            stock = plain(model(name, device, dtype, cpu=cpu), calls) if not comm.rank else []
            alone = error(stock, exact)
            for beside in (True, False) if timed else (True,):
                for graph in (False,) if cpu else (False, True):
                    shared = Shared(model(name, device, dtype, cpu=cpu), mesh, comm, beside=beside, graph=graph)
                    text = shared.row(calls, exact, alone, timed=timed)
                    kind = "MLP beside" if beside else "one after one"
                    yield f"{name:9}{str(dtype)[6:]:10}{kind:14}{'yes' if graph else 'no':7}{text}"


def model(name: str, device: torch.device, dtype: torch.dtype, *, cpu: bool) -> torch.nn.Module:
    """The same numbers on every rank and in every dtype."""
    from comfy.ldm.flux.model import Flux
    from comfy.ops import disable_weight_init

    heads, dim, axes = (3, 16, [4, 6, 6]) if cpu else (9, 128, [16, 56, 56])
    second = dict(patch_size=1, vec_in_dim=None, global_modulation=True, mlp_silu_act=True, ops_bias=False, qkv_bias=False)
    first = dict(patch_size=2, vec_in_dim=24, qkv_bias=True)
    sizes = dict(in_channels=16, out_channels=16, context_in_dim=40, hidden_size=heads * dim, num_heads=heads, mlp_ratio=3.0, axes_dim=axes)
    rest = dict(depth=1, depth_single_blocks=3, theta=10000, guidance_embed=True, txt_ids_dims=[])
    rest |= second if name == "flux2" else first
    found = Flux(image_model="flux", **sizes, **rest, dtype=torch.float32, operations=disable_weight_init)
    make = torch.Generator().manual_seed(1)
    for parameter in found.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.data = scale * torch.randn(parameter.shape, generator=make)
    found.dtype = dtype
    return found.to(device, dtype).requires_grad_(False).eval()


def inputs(name: str, device: torch.device, *, cpu: bool) -> list[tuple[torch.Tensor, ...]]:
    """Latents whose tokens do not divide by two, and what else a forward is given."""
    make = torch.Generator().manual_seed(2)
    sides = (10, 14) if cpu else (66, 94)
    sides = tuple(side // 2 for side in sides) if name == "flux2" else sides
    found = []
    for index in range(FORWARDS):
        tensors = [torch.randn(2, 16, *sides, generator=make), torch.full((2,), 0.9 - 0.2 * index), torch.randn(2, 77, 40, generator=make)]
        found.append((*tensors, torch.randn(2, 24, generator=make), torch.full((2,), 3.5)))
    return [tuple(tensor.to(device) for tensor in call) for call in found]


def given(call: tuple[torch.Tensor, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    # timestep and guidance are multiplied by 1000 inside, which bfloat16 would round to other ones
    return tuple(tensor if tensor.ndim == 1 else tensor.to(dtype) for tensor in call)


def plain(found: torch.nn.Module, calls: list[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
    return [found(*given(call, found.dtype), transformer_options={}) for call in calls]


def error(results: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """The largest of all forwards; NaN is one."""
    each = [float((one.float() - other).norm() / other.norm()) for one, other in zip(results, exact, strict=True)]
    return max((value if value == value else float("inf") for value in each), default=0.0)


class Shared:
    """A model whose compiled blocks both ranks run. ``beside``: their MLP beside the exchange, else as on one rank."""

    def __init__(self, found: torch.nn.Module, mesh: Mesh, comm: Communicator, *, beside: bool, graph: bool):
        from comfy.ldm.modules.attention import optimized_attention

        from para_core.attention.choice import Chooser
        from para_core.execution.compiled import CompiledBlocks
        from para_core.execution.runner import OVERRIDE, Runner
        from para_core.plans import plan_for

        torch._dynamo.reset()
        self.model, self.mesh, self.comm, self.graph, self.beside = found, mesh, comm, graph, beside
        self.said: list[str] = []
        self.runner = Runner(plan_for(found), found, Chooser(None, say=self.said.append), cached=False, stock=optimized_attention)
        self.runner.compiled = CompiledBlocks(self.runner.hooks, self.runner.override, OVERRIDE, self.said.append, shared=beside)
        self.runner.compiled.around = self.runner.graphs.constants.paused

    def forward(self, call: tuple[torch.Tensor, ...]) -> torch.Tensor:
        from para_core.execution.runner import OVERRIDE

        options = {"transformer_options": {OVERRIDE: self.runner.override}}
        result = self.runner.run(
            self.model.forward, NAMES, given(call, self.model.dtype), options, mesh=self.mesh, comm=self.comm, graph=self.graph
        )
        return result if result is not None else call[0]

    def row(self, calls: list[tuple[torch.Tensor, ...]], exact: list[torch.Tensor], alone: float, *, timed: bool) -> str:
        from para_core.execution.parallel_mlp import Mlp

        there, launched = Mlp.there, []

        def noted(mlp: Mlp) -> None:
            launched.append(self.mesh)
            there(mlp)

        Mlp.there = noted  # type: ignore[method-assign]
        try:
            results = [self.forward(call).clone() for call in calls]
            ms = self.milliseconds(calls[0]) if timed else float("nan")
        finally:
            Mlp.there = there  # type: ignore[method-assign]
            replays = self.runner.graphs.replays
            self.runner.remove()
        wrong = error(results, exact) if not self.comm.rank else 0.0
        fine = wrong <= 1.5 * alone + 2e-5 and not self.said and bool(launched) is self.beside and bool(replays) is self.graph
        bad = torch.tensor([float(not fine)], device=calls[0][0].device)
        self.comm.all_reduce(bad)
        notes = "ok" if not bad.item() else f"FAIL, {len(launched)} launched; {'; '.join(self.said)}"
        return f"{alone:<9.1e}{wrong:<9.1e}{replays:<9}{ms:<9.2f}{notes}"

    def milliseconds(self, call: tuple[torch.Tensor, ...]) -> float:
        """A forward, the median of ten, the device waited for."""
        found = []
        for _ in range(10):
            started = perf_counter()
            self.forward(call)
            self.comm.settle()
            found.append((perf_counter() - started) * 1e3)
        return median(found)
