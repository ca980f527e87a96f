"""The pack's nodes, one file a feature."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .accelerate import ParaAccelerate
from .attention import ParaAttention
from .cache import ParaFirstBlockCache
from .compile import ParaCompile
from .parallel import ParaParallel
from .report import ParaReport


class ParaDiT(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [ParaAccelerate, ParaParallel, ParaAttention, ParaFirstBlockCache, ParaCompile, ParaReport]


async def comfy_entrypoint() -> ParaDiT:
    return ParaDiT()
