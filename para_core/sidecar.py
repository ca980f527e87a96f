"""What a sidecar process runs: a script with the path of its socket as the only argument.

It is the one place where rooms are put together for a worker. Rank 0 tells it ComfyUI's folder and command-line flags
over the channel, so that the same flags rule on every rank and no setting ever reaches a command line.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def main(socket_path: str) -> None:
    here = Path(__file__).resolve()
    # Python puts a script's folder first, where our modules would hide others'. The pack goes last: it has a `nodes`
    # folder, and `import nodes` must find ComfyUI's.
    sys.path[:] = [entry for entry in sys.path if entry != str(here.parent)]
    sys.path.append(str(here.parents[1]))
    from para_core.group.launch import leave, parent_of, watch_parent

    try:
        parent = parent_of(socket_path)
    except OSError:
        return
    directory = Path(socket_path).parent
    watch_parent(parent, directory)

    from para_core.group.channel import answer

    channel = answer(socket_path)
    _, hello = channel.hear()
    sys.path.insert(0, hello["root"])

    from para_core.comfy.flags import adopt

    adopt(hello["flags"])  # before other modules of ComfyUI read them

    import torch

    if torch.device(hello["device"]).type == "cuda":
        hello["device"] = own_card(torch.device(hello["device"]), hello["card"])
        # before ComfyUI asks how much memory "the" GPU has, which on rank 0's would cost some hundred MB for every sidecar
        torch.cuda.set_device(hello["device"])

    from para_core.comfy.worker import serve

    serve(channel, hello, lambda: leave(parent, directory))


def own_card(device: torch.device, card: str) -> str:
    """What this process calls the GPU that is ``device`` in ComfyUI's; ``card``: its name for all, "" if unknown.

    Code of other packs may change the variables that hide and order GPUs after ComfyUI has read them. Raises RuntimeError.
    """
    import torch

    cards = [str(getattr(torch.cuda.get_device_properties(index), "uuid", "")) for index in range(torch.cuda.device_count())]
    if device.index >= len(cards) and (not card or card not in cards):
        raise RuntimeError(f"only {len(cards)} GPUs are visible here: CUDA_VISIBLE_DEVICES was changed after ComfyUI had started")
    if device.index < len(cards) and cards[device.index] == card or card not in cards:
        return str(device)
    return f"cuda:{cards.index(card)}"


if __name__ == "__main__":
    main(sys.argv[1])
