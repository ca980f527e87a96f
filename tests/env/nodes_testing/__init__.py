"""Nodes that exist only in the test server: tiny models, seeded conditioning without a text encoder, latents of any size."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from comfy_api.latest import ComfyExtension, io

TESTS = str(Path(__file__).resolve().parents[2])
if TESTS not in sys.path:
    sys.path.append(TESTS)  # behind ComfyUI's own folder, which has an `execution` and a `server` too


class TestConditioning(io.ComfyNode):
    """Seeded random text features, as a text encoder would give them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestConditioning",
            category="testing",
            inputs=[
                io.Int.Input("seed", default=0, min=0, max=2**31 - 1),
                io.Int.Input("tokens", default=16, min=1, max=4096),
                io.Int.Input("width", default=128, min=1, max=16384),
                io.Int.Input("pooled_width", default=0, min=0, max=16384, tooltip="0 = no pooled output"),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, seed: int, tokens: int, width: int, pooled_width: int) -> io.NodeOutput:
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(1, tokens, width, generator=generator)
        options = {"pooled_output": torch.randn(1, pooled_width, generator=generator)} if pooled_width else {}
        return io.NodeOutput([[features, options]])


class TestEmojiPrompt(io.ComfyNode):
    """Text features of a prompt for the small trained model, from the table of words beside it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        text = io.String.Input("text", default="", tooltip="name of an emoji, with a background if wanted: red apple on blue")
        return io.Schema(node_id="TestEmojiPrompt", category="testing", inputs=[text], outputs=[io.Conditioning.Output()])

    @classmethod
    def execute(cls, text: str) -> io.NodeOutput:
        from assets import prompts

        return io.NodeOutput(prompts.Words().conditioning(text))


class TestLatent(io.ComfyNode):
    """An empty latent whose sides are given in latent pixels, for sizes the stock nodes round away."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestLatent",
            category="testing",
            inputs=[
                io.Int.Input("width", default=16, min=1, max=4096),
                io.Int.Input("height", default=16, min=1, max=4096),
                io.Int.Input("frames", default=0, min=0, max=4096, tooltip="0 = an image: no axis for frames"),
                io.Int.Input("batch_size", default=1, min=1, max=64),
                io.Int.Input("channels", default=16, min=1, max=256),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, width: int, height: int, frames: int, batch_size: int, channels: int) -> io.NodeOutput:
        time = (frames,) if frames else ()
        return io.NodeOutput({"samples": torch.zeros(batch_size, channels, *time, height, width)})


class TestModel(io.ComfyNode):
    """A family's tiny model; most families' files are only recognised at full size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="TestModel", category="testing", inputs=[io.String.Input("case")], outputs=[io.Model.Output()])

    @classmethod
    def execute(cls, case: str) -> io.NodeOutput:
        from families import stock

        return io.NodeOutput(stock.patcher(case)[0])


class TestPrompt(io.ComfyNode):
    """What the family's text encoder would give."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.String.Input("case"), io.Float.Input("scale", default=1.0)]
        return io.Schema(node_id="TestPrompt", category="testing", inputs=inputs, outputs=[io.Conditioning.Output()])

    @classmethod
    def execute(cls, case: str, scale: float) -> io.NodeOutput:
        from families import stock

        return io.NodeOutput(stock.prompt(case, stock.patcher(case)[1], scale))


class TestOneCard(io.ComfyNode):
    """From here on ranks share this model's GPU: for machines with one. Rank 0 needs an NCCL_HOSTID of its own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="TestOneCard", category="testing", inputs=[io.Model.Input("model")], outputs=[io.Model.Output()])

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        sidecars = next(module for name, module in [*sys.modules.items()] if name.endswith(".para_core.comfy.sidecars"))
        sidecars.devices = lambda settings, own, _say: [f"cuda:{own.index or 0}"] * (settings.gpus - 1)
        sidecars.group()._pool._environment["NCCL_HOSTID"] = "paradit-rank1"
        return io.NodeOutput(model)


class TestingExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [TestConditioning, TestEmojiPrompt, TestLatent, TestModel, TestOneCard, TestPrompt]


async def comfy_entrypoint() -> TestingExtension:
    return TestingExtension()
