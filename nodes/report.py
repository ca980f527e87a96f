"""Sampling Report."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from ..para_core.comfy import chart, notify, reports, wording


class ParaReport(io.ComfyNode):
    """What the run that made these latents did: times, ranks, attention kernels, cached steps, and what it fell back from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ParaReport",
            display_name="Sampling Report",
            category="ParaDiT",
            description=cls.__doc__,
            search_aliases=["benchmark", "seconds per step", "step time", "cache chart"],
            is_output_node=True,
            inputs=[io.Latent.Input("samples", tooltip="Latents of a sampler, or made from them by other nodes. They pass through.")],
            outputs=[
                io.Latent.Output("samples", tooltip="The same latents."),
                io.Image.Output("chart", tooltip="What the cache judged each step by, and seconds of every step; one picture a run."),
                io.String.Output("text", tooltip="The report in words."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def execute(cls, samples) -> io.NodeOutput:
        found, why = reports.find(cls.hidden.dynprompt, cls.hidden.unique_id, samples["samples"])
        text = "\n\n".join(wording.text(run.report, run.maker) for run in found) or why
        pictures = torch.stack([chart.draw(run.report) for run in found] or [chart.empty(why)])
        notify.show(text)
        return io.NodeOutput(samples, pictures, text, ui={**ui.PreviewImage(pictures).as_dict(), "text": [text]})
