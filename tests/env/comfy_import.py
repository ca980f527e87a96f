"""ComfyUI's modules in a process that is not its server: tests of the glue, exploratory scripts."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from .prepare import HERE, Environment


def boot_comfy(flags: Sequence[str] = ("--cpu",)) -> None:
    """Make `import comfy.*` work, with these command-line flags. Call it before the first such import.

    ComfyUI's root goes first on sys.path, because the checkout has a `nodes` too.
    """
    if "comfy.options" in sys.modules:
        return
    sys.path[:0] = [str(Environment.locate().comfyui), str(HERE / "stubs")]
    import standins

    standins.install()
    saved = sys.argv
    sys.argv = ["comfy", *flags]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # noqa: F401  reads sys.argv when imported
    finally:
        sys.argv = saved
    logging.getLogger().setLevel(logging.WARNING)


def initialise_memory() -> None:
    """What ComfyUI's main.py does about memory before it builds anything, by the flags that `boot_comfy` was given.

    Its own module chooses the CUDA allocator, which torch reads from the environment when it is imported: call this before.
    """
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported before the CUDA allocator was chosen")
    import cuda_malloc  # noqa: F401  reads the flags and sets the variable when imported

    dynamic_vram()


def dynamic_vram() -> bool:
    """Turn dynamic VRAM on as main.py does, unless a flag forbids it. Returns whether it is on."""
    import comfy.cli_args

    args = comfy.cli_args.args
    if not comfy.cli_args.enables_dynamic_vram():
        return False
    import comfy_aimdo.control

    headroom = None if args.reserve_vram is None else int(args.reserve_vram * 1024**3)
    comfy_aimdo.control.init(simple_vram_headroom=headroom, nvml_pressure=not args.disable_nvml_pressure)
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher

    devices = comfy.model_management.get_all_torch_devices()
    if not comfy_aimdo.control.init_devices((device.index, int(args.vram_headroom * 1024**3)) for device in devices):
        print("dynamic VRAM is not available here")
        return False
    comfy_aimdo.control.set_log_info()  # else it writes a line for every allocation, which takes longer than the allocation
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
    return True
