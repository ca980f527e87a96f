"""Weights where there is a GPU: two ranks on ONE card, in every way that ComfyUI can hold a model.

    python tests/gpu/weights.py           every case, a table last (about three minutes on one H100)
    python tests/gpu/weights.py --cpu     the same with CPU ranks and a tiny model, to see that the script works
    python tests/gpu/weights.py NAME ...  only these cases

Each case is a process of its own, with ComfyUI's flags of that case. It samples stock and shared, without and with a LoRA, and
compares latents; where rank 0 patches weights as it fetches them, it compares the bits that were sent with those that rank 0
computes with. Host memory is what /proc/PID/smaps_rollup calls Pss, where pages that both processes map count half in each: first
what is the processes' own (Pss_Anon, Pss_Shmem), which is what counts, then pages of files, which the system drops when it needs
the memory; the peak is that of VmRSS, files included. All are growths, from a group that has sampled another, tiny model.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)  # this folder holds names of others
sys.path.append(str(HERE.parents[1]))

from gpu import processes  # noqa: E402
from gpu.case import FLUX, other_ranks, relative, sample, write_flux  # noqa: E402

STEPS = 2
LIMIT = 150  # seconds a case
TOGETHER = 3  # cases at a time
LIBRARIES = 64 * 2**20  # bytes that CUDA's libraries take for the kernels that a model needs first, whatever its size
EXACT = "--fp32-unet"  # storage and arithmetic in float32, so that another rounding of one LoRA weight would show


@dataclass(frozen=True)
class Case:
    """``usable``: GB of the card that ComfyUI may use beside half of the model's size (None: all of the card).

    opened: whether the sidecar must open the file itself. host: the most that host memory may grow a rank, in models' sizes,
    beside that of libraries.
    """

    flags: tuple[str, ...]
    weight_dtype: str = "default"
    usable: float | None = None
    opened: bool = False
    host: float | None = 0.10
    tolerance: float = 1e-5


CASES = {
    "classic": Case(("--disable-dynamic-vram", EXACT)),
    "classic-fp8": Case(("--disable-dynamic-vram",), "fp8_e4m3fn", tolerance=2e-2),
    "dynamic": Case((EXACT,)),
    "dynamic-bf16": Case(("--bf16-unet",), tolerance=2e-2),
    "dynamic-fp8": Case((), "fp8_e4m3fn", tolerance=2e-2),
    "dynamic-small-card": Case((EXACT,), usable=0.0, opened=True, host=None),
    "novram": Case(("--disable-dynamic-vram", "--novram", EXACT), opened=True, host=None),
    "lowvram-small-card": Case(("--disable-dynamic-vram", "--lowvram", EXACT), usable=1.0, opened=True, host=None, tolerance=1e-3),
}
HEADS = {"case": 20, "lora": 5, "ok": 4, "ranks": 5, "way": 7, "error": 8, "bits": 9, "host MB own/files/peak, a rank": 32, "model": 7}


# -- the parent: starts the cases, prints the table -------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        inside(options.case, options.folder, cpu=options.cpu)
        return
    started = time.time()
    with tempfile.TemporaryDirectory(prefix="paradit-gpu-") as folder:
        call = [sys.executable, str(Path(__file__).resolve()), "--folder", folder, *(["--cpu"] if options.cpu else [])]
        write_files(Path(folder), cpu=options.cpu)
        names = options.names or list(CASES)
        # those that count the card's free memory run alone
        alone = [name for name in names if CASES[name].usable is not None]
        together = [name for name in names if name not in alone]
        rows = processes.run(call, together, HEADS, limit=LIMIT, jobs=TOGETHER)
        rows += processes.run(call, alone, HEADS, limit=LIMIT, jobs=1)
    sys.exit(bool(processes.table(HEADS, rows, started)))


def write_files(folder: Path, *, cpu: bool) -> None:
    """A FLUX, a LoRA for it, and a smaller one that is sampled first."""
    from env import models
    from safetensors.torch import save_file

    model = write_flux(folder, cpu=cpu)
    save_file(models.low_rank(model, ("attn.qkv", "linear1", "mlp.0"), seed=52, kohya=True), folder / "lora.safetensors")
    save_file(models.flux(seed=53, heads=1, double_blocks=1, single_blocks=1), folder / "warm.safetensors")


# -- a case: rank 0 ---------------------------------------------------------------------------------------------------------


def inside(name: str, folder: Path, *, cpu: bool) -> None:
    case = CASES[name]
    flags = [*case.flags] if not cpu else ["--cpu"]
    if case.usable is not None and not cpu:
        flags += ["--reserve-vram", f"{card() - case.usable - (folder / FLUX).stat().st_size / 2**31:.2f}"]
    from env.comfy_import import boot_comfy, dynamic_vram

    boot_comfy(flags)
    faulthandler.dump_traceback_later(LIMIT - 20)
    logging.getLogger("paradit").setLevel(logging.INFO)
    if not cpu:
        dynamic_vram()
    import torch

    from para_core.settings import Parallel

    settings, group = Parallel(2), other_ranks(cpu=cpu)
    with torch.inference_mode():
        warm = loaded(folder / "warm.safetensors", case.weight_dtype)  # libraries that its arithmetic needs are loaded now
        sample(shared(warm, settings), STEPS, big=False)
        del warm
        print(f"{name}: a first model has been sampled", flush=True)
        base = loaded(folder / FLUX, case.weight_dtype)
        size = base.model_size()
        for lora in ("off", "on", "off"):
            try:
                processes.put(name, lora, *row(case, settings, group, base, folder, lora, size, cpu=cpu))
            except BaseException as error:  # noqa: BLE001  the table says it, the next row is tried
                traceback.print_exc()
                processes.put(*processes.failed(name, lora, HEADS, f"{type(error).__name__}: {error}"))
    group.close()
    sys.stdout.flush()
    os._exit(0)


def card() -> float:
    """GB that the card has; asked in another process, because ComfyUI must see its flags before CUDA is used."""
    ask = "import torch; print(torch.cuda.get_device_properties(0).total_memory)"
    return int(subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout) / 2**30


def loaded(path: Path, weight_dtype: str) -> Any:
    """As Load Diffusion Model does it."""
    import comfy.sd
    import torch

    options = {"dtype": torch.float8_e4m3fn} if weight_dtype == "fp8_e4m3fn" else {}
    return comfy.sd.load_diffusion_model(str(path), model_options=options)


def with_lora(base: Any, folder: Path, strength: float) -> Any:
    import comfy.sd
    import comfy.utils

    file = comfy.utils.load_torch_file(str(folder / "lora.safetensors"), safe_load=True)
    return comfy.sd.load_lora_for_models(base, None, file, strength, 0)[0]


def shared(model: Any, settings: Any) -> Any:
    from para_core.comfy.attach import attach

    return attach(model, settings)


def row(case: Case, settings: Any, group: Any, base: Any, folder: Path, lora: str, size: int, *, cpu: bool) -> list[str]:
    import comfy.model_management
    from parity.inprocess import reports

    model = with_lora(base, folder, 0.8) if lora == "on" else base
    first = sample(model, STEPS, big=False)
    expected = sample(model, STEPS, big=False)  # from now on, because ComfyUI rounds some patched weights only after their first use
    pids, before = [os.getpid(), *group.pids], dict(group.counts)
    for pid in pids:
        with suppress(OSError):  # where the kernel has no such file, peaks are those since the process began
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # peaks begin anew
    host, start = [used(pid) for pid in pids], [kilobytes(f"/proc/{pid}/status", "VmRSS:") for pid in pids]
    with reports() as lines:
        result = sample(shared(model, settings), STEPS, big=False)
    peaks = [kilobytes(f"/proc/{pid}/status", "VmHWM:") - rss for pid, rss in zip(pids, start, strict=True)]
    grown = [(used(pid)[0] - own, used(pid)[1] - files) for pid, (own, files) in zip(pids, host, strict=True)]
    report = lines[-1]
    error, own = (relative(one, expected) for one in (result, first))
    way = next((kind for kind in ("models", "patches", "opened") if group.counts[kind] > before.get(kind, 0)), "held")
    equal, compared = (0, 0) if way == "opened" else bits(model)
    wrong = []
    if report["ranks"] != 2 or report["notes"]:
        wrong.append("not shared")
    if not error <= max(case.tolerance * STEPS, 3 * own):
        wrong.append("inexact")
    if case.opened and way != "opened" and not cpu:
        wrong.append("the file was not opened")
    if not case.opened and way == "opened":
        wrong.append("the file was opened")
    if equal != compared:
        wrong.append("other bits")
    if case.host is not None and not cpu and max(own for own, _ in grown) > max(case.host * size, LIBRARIES):
        wrong.append("host memory")
    memory = [f"{own / 2**20:.0f}/{files / 2**20:.0f}/{high / 2**20:.0f}" for (own, files), high in zip(grown, peaks, strict=True)]
    comfy.model_management.soft_empty_cache()
    return [
        "FAIL" if wrong else "ok",
        str(report["ranks"]),
        way,
        f"{error:.1e}",
        f"{equal}/{compared}",
        " + ".join(memory),
        f"{size / 2**20:.0f} MB",
        "; ".join([*wrong, f"stock with itself {own:.0e}", *report["notes"]])[:220],
    ]


def bits(model: Any) -> tuple[int, int]:
    """Of the layers that rank 0 patches as it fetches them and that are on its card: how many it sends bit by bit, and all."""
    import torch

    from para_core.comfy import model as models

    equal = compared = 0
    diffusion_model = model.model.diffusion_model
    units = {unit.rows[0][0].rpartition(".")[0]: unit for unit in models.units(model)} if model.is_dynamic() else {}
    for layer, module in diffusion_model.named_modules():
        there = getattr(module, "_v_weight", None)
        if there is None or getattr(module, "_v_signature", None) is None or getattr(module, "weight_lowvram_function", None) is None:
            continue
        sent = dict(zip([name for name, _, _ in units[layer].rows], units[layer].read(), strict=True))[f"{layer}.weight"]
        if type(there) is torch.Tensor and there.dtype == sent.dtype:
            compared += 1
            equal += torch.equal(there.view(torch.uint8).cpu(), sent.view(torch.uint8).cpu())
    return equal, compared


def used(pid: int) -> tuple[int, int]:
    """Bytes of memory of a process: its own, and files' that it maps; what it shares counted in parts."""
    path = f"/proc/{pid}/smaps_rollup"
    if not Path(path).exists():  # some containers: pages count whole in each process
        status = f"/proc/{pid}/status"
        return kilobytes(status, "RssAnon:") + kilobytes(status, "RssShmem:"), kilobytes(status, "RssFile:")
    return kilobytes(path, "Pss_Anon:") + kilobytes(path, "Pss_Shmem:"), kilobytes(path, "Pss_File:")


def kilobytes(path: str, key: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
