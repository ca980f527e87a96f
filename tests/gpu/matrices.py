"""Does a message hide behind matrices? On one card, beside a kernel that holds as many multiprocessors as a message would.

    python tests/gpu/matrices.py          the layers that FLUX's single blocks compute beside the exchange (about a minute)
    python tests/gpu/matrices.py --cpu    small layers and no message, to see that the script works

Kernels for matrices may be persistent: as many blocks as the card has multiprocessors, each with an equal part of the tiles. If a
message holds some of them, as many blocks begin only when it ends, and as much later all is done: nothing is hidden (pytorch
issue 143988). They can be told to leave some out (``torch._C._set_sm_carveout_experimental``, for matrices by cuBLASLt).

Columns, in milliseconds: `layer`: alone; `less`: alone, so many multiprocessors left out; `message`: alone, half a layer long; `both`:
launched as by an exchange, the message first, on a stream of high priority; `both, less`: the same with multiprocessors left out.
`hidden`: the share of the message that costs nothing, then with multiprocessors left out. Replays of CUDA graphs of ten.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parents[1])  # this folder holds names of others
sys.path.append(str(HERE.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

TOKENS = {"FLUX 1024², 1 of 2 ranks": 2304, "FLUX 1024², 1 of 4 ranks": 1152, "FLUX 2048², 1 of 2 ranks": 8448}
WIDTH, FEATURES = 3072, 12288
HELD = (1, 8, 16, 32)
REPEATS = 10
Call = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    if options.cpu:
        for name, call in layers(torch.device("cpu"), torch.float32, 48, 24, 96).items():
            print(name, tuple(call().shape))
        return
    warnings.filterwarnings("ignore", message=".*SM carveout.*")
    device = torch.device("cuda")
    print(torch.cuda.get_device_name(device), torch.__version__)
    print(f"{'':28}{'layer':7}{'held':>5}{'layer':>8}{'less':>8}{'message':>9}{'both':>8}{'both, less':>12}{'hidden':>9}{'less':>7}")
    with torch.inference_mode():
        for shape, tokens in TOKENS.items():
            for name, call in layers(device, torch.bfloat16, tokens, WIDTH, FEATURES).items():
                for held in HELD:
                    print(f"{shape:28}{name:7}{held:5}{row(call, held)}", flush=True)


def layers(device: torch.device, dtype: torch.dtype, tokens: int, width: int, features: int) -> dict[str, Callable[[], torch.Tensor]]:
    """What is computed while q, k and v travel, and while attention's outputs do; the latter's weight is a part of a wider one."""
    make = torch.Generator().manual_seed(0)
    shapes = [(tokens, width), (features, width), (features,), (tokens, features), (width, width + features), (width,)]
    x, up, up_bias, m, down, down_bias = (torch.randn(shape, generator=make).to(device, dtype) for shape in shapes)
    return {
        "there": lambda: torch._addmm_activation(up_bias, x, up.t(), use_gelu=True),
        "back": lambda: F.linear(m, down[:, width:], down_bias),
    }


def row(call: Call, held: int) -> str:
    alone = milliseconds(call)
    message = Message(held, alone / 2)
    less, only = milliseconds(call, held), milliseconds(message.beside(lambda: None))
    both, spared = milliseconds(message.beside(call)), milliseconds(message.beside(call), held)
    hidden = [(alone + only - time) / only for time in (both, spared)]
    return f"{alone:8.3f}{less:8.3f}{only:9.3f}{both:8.3f}{spared:12.3f}{hidden[0]:9.0%}{hidden[1]:7.0%}"


class Message:
    """A kernel that holds ``held`` multiprocessors for so many ``milliseconds``: with as many threads as NCCL's."""

    def __init__(self, held: int, milliseconds: float):
        from bench.waiting import wait

        self._launch = lambda: wait[(held,)](int(milliseconds * 1e6), num_warps=16)
        self._launch()  # compiled outside of a capture
        self._aside = torch.cuda.Stream(priority=-1)

    def beside(self, call: Call) -> Call:
        def both() -> None:
            ready, done = torch.cuda.Event(), torch.cuda.Event()
            ready.record()
            self._aside.wait_event(ready)
            with torch.cuda.stream(self._aside):
                self._launch()
            done.record(self._aside)
            call()
            torch.cuda.current_stream().wait_event(done)

        return both


def milliseconds(call: Call, left_out: int | None = None) -> float:
    """The median of twenty replays of ``REPEATS`` calls."""
    torch._C._set_sm_carveout_experimental(left_out)
    try:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(REPEATS):
                call()
    finally:
        torch._C._set_sm_carveout_experimental(None)
    found = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / REPEATS)
    return median(found)


if __name__ == "__main__":
    main()
