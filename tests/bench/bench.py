"""What ParaDiT costs and saves, measured against stock ComfyUI in one run on one machine.

    python bench.py overhead     hooks and step header on a 30-block model; the group's start; bytes exchanged
    python bench.py steps        seconds per step of real-size models with random weights (CUDA), tiny ones without CUDA
    python bench.py              both
    python bench.py quality      pictures of every way of saving work beside those of the uncached run (see quality.py);
                                 writes records/quality.json, quality.png and its part of RESULTS.md

Prints a table, and writes everything to a JSON record (hardware, versions, date, commit) under records/.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import subprocess
import sys
from datetime import date
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from env import comfy_import  # noqa: E402

PACKAGES = ("comfy-kitchen", "sageattention", "flash-attn", "diffusers", "cache-dit")


def installed(package: str) -> str | None:
    """Version of a package that may be missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, str]:
    """Where and what was measured."""
    import torch

    cuda = torch.cuda.is_available()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": date.today().isoformat(),
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: version for package in PACKAGES if (version := installed(package))},
        "device": f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}" if cuda else f"{platform.machine()} CPU",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["overhead", "steps", "quality"])
    parser.add_argument("--quick", action="store_true", help="few repeats and tiny models: only shows that the command works")
    parser.add_argument("--models", default="flux-1024,flux-2048,wan-480p", help="for steps: which, separated by commas")
    parser.add_argument("--backends", default="exact,auto", help="for steps: attention backends")
    parser.add_argument("--modes", default="off,compile+graph", help="for steps: how blocks run")
    parser.add_argument("--out", type=Path, default=HERE / "records", help="folder for the JSON record")
    parser.add_argument("--short", action="store_true", help="for quality: a few pictures in this process, nothing written")
    parser.add_argument("--report", action="store_true", help="for quality: only curves and table, from the record that is there")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()

    import torch

    comfy_import.boot_comfy("--disable-dynamic-vram" if torch.cuda.is_available() else "--cpu")
    if options.what == "quality":
        import quality

        return quality.main(options, machine())
    import overhead
    import steps

    tables: dict[str, list[dict[str, object]]] = {}
    if options.what in (None, "overhead"):
        tables["overhead"] = overhead.measure(quick=options.quick)
    if options.what in (None, "steps"):
        lists = (text.split(",") for text in (options.models, options.backends, options.modes))
        tables["steps"] = steps.measure(*lists, quick=options.quick)
    options.out.mkdir(parents=True, exist_ok=True)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    path = options.out / f"{date.today().isoformat()}-{kind}-{options.what or 'all'}.json"
    path.write_text(json.dumps({"machine": machine(), **tables}, indent=1) + "\n")
    print(json.dumps(machine()))
    for row in itertools.chain(*tables.values()):
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    print(f"record: {path}")


if __name__ == "__main__":
    main()
