"""ParaDiT's library: sequence parallelism, step caching and attention backends for diffusion transformers.

Importable without ComfyUI and without CUDA; only ``para_core.comfy`` imports ComfyUI.
"""

__version__ = "0.1.0"
