"""First Block Cache."""

from __future__ import annotations

from comfy_api.latest import io

from ..para_core.cache.predictor import ORDERS
from ..para_core.cache.rule import RULES
from ..para_core.comfy import attach
from ..para_core.settings import Cache


class ParaFirstBlockCache(io.ComfyNode):
    """Steps whose first block barely changed reuse the rest of the last computed step."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ParaFirstBlockCache",
            display_name="First Block Cache",
            category="ParaDiT",
            description=cls.__doc__,
            search_aliases=["fbcache", "teacache", "step cache", "wavespeed"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with."),
                io.Float.Input(
                    "threshold",
                    default=0.08,
                    min=0.0,
                    max=5.0,
                    step=0.01,
                    tooltip="A step is skipped when its first block changed less than this share (rule classic), or while the expected "
                    "error in percent is less (forecast). Higher = faster and less exact; 0 = off.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Steps may be reused from here on: 0 = the beginning of the sampling, 1 = its end.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Steps may be reused up to here: 0 = the beginning of the sampling, 1 = its end.",
                ),
                io.Int.Input(
                    "max_consecutive_hits",
                    default=-1,
                    min=-1,
                    max=1000,
                    tooltip="Steps that may be reused one after the other. -1 = no limit, 0 = never.",
                ),
                io.Combo.Input(
                    "predictor",
                    options=list(ORDERS),
                    default="reuse",
                    tooltip="With classic: reuse = take the rest of the step as it was; taylor = follow its trend over two computed steps.",
                ),
                io.Combo.Input(
                    "rule",
                    options=list(RULES),
                    default="classic",
                    optional=True,  # graphs from before it was there do not have it
                    tooltip="classic = skip a step whose first block changed less than the threshold; forecast = foretell results "
                    "while the error expected of that, in percent, is under the threshold.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the cache.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        threshold: float,
        start_percent: float,
        end_percent: float,
        max_consecutive_hits: int,
        predictor: str,
        rule: str = "classic",
    ) -> io.NodeOutput:
        return io.NodeOutput(attach.attach(model, Cache(threshold, start_percent, end_percent, max_consecutive_hits, predictor, rule)))
