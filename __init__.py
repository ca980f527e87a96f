"""ParaDiT: fast diffusion-transformer sampling on one GPU and on several."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./js"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
