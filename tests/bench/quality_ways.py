"""The ways of sampling that the quality measurement compares, each as a stock model with something attached.

`SERIES` names them; a `Setting` picks one and its one number (a threshold, or how many steps). What is saved is counted
alike for all of them: rows that pass the largest linear layer of every block, against those of the uncached run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from para_core.comfy.attach import attach
from para_core.settings import Cache


@dataclass(frozen=True)
class Setting:
    """One column of the measurement: how to sample. `value`: the series' threshold, or its number of steps."""

    series: str
    value: float = 0.0
    cfg: float = 1.0
    sampler: str = "euler"
    scheduler: str = "simple"
    steps: int = 20

    def but(self, **changes: Any) -> Setting:
        return replace(self, **changes)

    @property
    def sampled(self) -> int:
        return int(self.value) if self.series == "fewer steps" else self.steps

    @property
    def stock(self) -> Setting:
        return self.but(series="stock", value=0.0)


def ours(**fields: Any) -> Callable[[Any, float], Any]:
    return lambda model, value: attach(model, Cache(value, **fields))


def easy(model: Any, value: float) -> Any:
    """EasyCache with the node's own defaults.

    On a skipped step it adds to the very tensor that holds the latent. Where a model runs in another dtype than the sampler
    that is a copy; in float32 it is the sampler's own, and pictures fall apart. So it gets a copy here too.
    """
    from comfy.patcher_extension import WrappersMP
    from comfy_extras.nodes_easycache import EasyCacheNode

    def copy(executor: Callable, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return executor(x.clone(), *args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "copy", copy)
    return EasyCacheNode.execute(model, value, 0.15, 0.95, False).args[0]


def lazy(model: Any, value: float) -> Any:
    from comfy_extras.nodes_easycache import LazyCacheNode

    return LazyCacheNode.execute(model, value, 0.15, 0.95, False).args[0]


# -- the accumulated rule of TeaCache (arXiv 2411.19108) ----------------------------------------------------------------


@dataclass
class Accumulated:
    """Adds up how much the first block's modulated input changed since the last step; computes once that is too much.

    The change, relative in the mean absolute, goes through a polynomial that turns it into the change of the model's
    output (`calibrate`). The first and the last step are computed. A skipped step adds the stack's last residual.
    """

    threshold: float
    polynomial: Sequence[float]
    total: float = 0.0
    before: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    skip: bool = False
    seen: list[tuple[float, float]] = field(default_factory=list)
    output: torch.Tensor | None = None

    def attach(self, model: Any) -> Any:
        from comfy.patcher_extension import WrappersMP

        model = model.clone()
        blocks = model.model.diffusion_model
        for index in range(len(blocks.double_blocks)):
            model.set_model_patch_replace(self._double(blocks.double_blocks[0], index), "dit", "double_block", index)
        for index in range(len(blocks.single_blocks)):
            last = index == len(blocks.single_blocks) - 1
            model.set_model_patch_replace(self._single(last), "dit", "single_block", index)
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "accumulated", self._run)
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "accumulated", self._forward)
        return model

    def _run(self, executor: Callable, *args: Any, **kwargs: Any) -> Any:
        self.total, self.before, self.residual, self.output = 0.0, None, None, None
        return executor(*args, **kwargs)

    def _double(self, first: Any, index: int) -> Callable:
        def block(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
            if index == 0:
                self._decide(first, args)
                self._image = args["img"].clone()
            return {"img": args["img"], "txt": args["txt"]} if self.skip else extra["original_block"](args)

        return block

    def _single(self, last: bool) -> Callable:
        def block(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
            out = args["img"] if self.skip else extra["original_block"](args)["img"]
            if last:
                text = out.shape[1] - self._image.shape[1]
                if self.skip:
                    out = torch.cat((out[:, :text], self._image + self.residual), dim=1)
                else:
                    self.residual = out[:, text:] - self._image
            return {"img": out}

        return block

    def _decide(self, first: Any, args: dict[str, Any]) -> None:
        modulation, _ = first.img_mod(args["vec"])
        now = (1 + modulation.scale) * first.img_norm1(args["img"]) + modulation.shift
        options = args["transformer_options"]
        sigma, levels = float(options["sigmas"].flatten()[0]), options["sample_sigmas"]
        inside = float(levels[-2]) < sigma < float(levels[0])
        self.change = relative(now, self.before) if self.before is not None else 0.0
        self.before = now.clone()
        value = 0.0
        for coefficient in self.polynomial:  # highest power first
            value = value * self.change + coefficient
        self.total += value
        self.skip = inside and self.residual is not None and self.total < self.threshold
        if not self.skip:
            self.total = 0.0

    def _forward(self, executor: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = executor(*args, **kwargs)
        if self.output is not None:
            self.seen.append((self.change, relative(output, self.output)))
        self.output = output.clone()
        return output


def relative(now: torch.Tensor, before: torch.Tensor) -> float:
    """mean|now - before| / mean|before|"""
    return float((now - before).abs().mean() / before.abs().mean())


def calibrate(model: Any, run: Callable[[Any, int], Any], runs: int) -> list[float]:
    """The polynomial of degree 4 from input to output changes of `runs` uncached runs, highest power first."""
    import numpy as np

    pairs: list[tuple[float, float]] = []
    for index in range(runs):
        watch = Accumulated(0.0, (0.0,))
        run(watch.attach(model), index)
        pairs += watch.seen
    inputs, outputs = zip(*pairs, strict=True)
    return [float(value) for value in np.polyfit(inputs, outputs, 4)]


# -- all of them --------------------------------------------------------------------------------------------------------

SERIES: dict[str, Callable[[Any, float], Any]] = {
    "stock": lambda model, _value: model,
    "fewer steps": lambda model, _value: model,
    "reuse": ours(predictor="reuse"),
    "taylor": ours(predictor="taylor"),
    "forecast": ours(rule="forecast"),
    "forecast from 20 %": ours(rule="forecast", start_percent=0.2),
    "EasyCache": easy,
    "LazyCache": lazy,
}  # and "TeaCache rule", which needs its polynomial


class Work:
    """Rows that passed each block's largest linear layer inside `counting`."""

    def __init__(self, model: Any):
        diffusion = model.model.diffusion_model
        self.layers = [largest(block) for block in (*diffusion.double_blocks, *diffusion.single_blocks)]
        self.rows = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        self.rows = 0
        handles = [layer.register_forward_pre_hook(self._count) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _count(self, _layer: Any, args: tuple) -> None:
        self.rows += args[0].shape[0]


def largest(block: torch.nn.Module) -> torch.nn.Module:
    return max((part for part in block.modules() if isinstance(part, torch.nn.Linear)), key=lambda part: part.weight.numel())
