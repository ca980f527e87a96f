"""The glue to ComfyUI: the only room of ``para_core`` that imports it."""
