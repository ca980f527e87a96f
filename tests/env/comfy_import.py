"""ComfyUI's modules in a process that is not its server: tests of the glue, exploratory scripts."""

from __future__ import annotations

import logging
import sys

from .prepare import HERE, Environment


def boot_comfy(*flags: str) -> None:
    """Make `import comfy.*` work, with these command-line flags (none: `--cpu`). Call it before the first such import.

    ComfyUI's root goes first on sys.path, because the checkout has a `nodes` too.
    """
    if "comfy.options" in sys.modules:
        return
    sys.path[:0] = [str(Environment.locate().comfyui), str(HERE / "stubs")]
    import standins

    standins.install()
    saved = sys.argv
    sys.argv = ["comfy", *(flags or ("--cpu",))]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # noqa: F401  reads sys.argv when imported
    finally:
        sys.argv = saved
    logging.getLogger().setLevel(logging.WARNING)
