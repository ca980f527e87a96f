"""The JSON record of a measurement: written after every row, so that a later call can go on where one was cut off."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECORDS = HERE / "records"
PACKAGES = ("comfy-kitchen", "comfy-aimdo", "sageattention", "flash-attn", "triton", "diffusers", "cache-dit")
DRIVER = Path("/proc/driver/nvidia/version")
SAME = ("commit", "torch", "device", "driver", *PACKAGES)
"""What must not change within a record."""
KEY = ("case", "way", "memory", "measure")
"""What tells one row of a table from another."""

Row = dict[str, Any]


class Stale(RuntimeError):
    """A record that was measured elsewhere, or with other code, cannot be gone on with."""


@dataclass
class Record:
    """``tables``: rows by table. A row with ``failed`` holds no measurement; those of earlier calls are tried again."""

    path: Path
    machine: dict[str, str] = field(default_factory=dict)
    tables: dict[str, list[Row]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Record:
        found = json.loads(path.read_text()) if path.exists() else {}
        return cls(path, found.pop("machine", {}), found)

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps({"machine": self.machine, **self.tables}, indent=1) + "\n")
        new.replace(self.path)

    def take(self, machine: dict[str, str]) -> None:
        """Say what is measured on. Raises Stale if rows are there from another machine or commit."""
        other = [name for name in SAME if self.machine and self.machine.get(name) != machine.get(name)]
        if other:
            words = ", ".join(f"{name} {self.machine.get(name)} instead of {machine.get(name)}" for name in other)
            raise Stale(f"{self.path} was measured with {words}: begin a new record (no --resume)")
        self.machine = self.machine or machine
        self.write()

    def resume(self) -> None:
        """Begin another call: what failed is tried again. Raises Stale for a record that does not know its commit."""
        if self.machine.get("commit") == "unknown":
            raise Stale(f"{self.path} does not know its commit, so it cannot be gone on with: name it with --commit")
        self.tables = {table: [row for row in rows if "failed" not in row] for table, rows in self.tables.items()}

    def find(self, table: str, **key: str) -> Row | None:
        return next((row for row in self.tables.get(table, []) if all(row.get(name) == value for name, value in key.items())), None)

    def put(self, table: str, row: Row) -> None:
        """Add a row, or replace the one of its key, and write the file."""
        rows = self.tables.setdefault(table, [])
        there = self.find(table, **{name: row[name] for name in KEY if name in row})
        if there is None:
            rows.append(row)
        else:
            rows[rows.index(there)] = row
        self.write()

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        return ((table, row) for table, rows in self.tables.items() for row in rows)


def installed(package: str) -> str | None:
    """Version of a package that may be missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine(commit: str) -> dict[str, str]:
    """Where and what is measured. Imports torch. ``commit``: "" asks git."""
    import torch

    cuda = torch.cuda.is_available()
    if not commit:
        git = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()
    driver = re.search(r"\d+\.\d+(\.\d+)*", DRIVER.read_text()) if DRIVER.exists() else None
    now = datetime.now()
    return {
        "date": now.date().isoformat(),
        "time": now.isoformat(timespec="minutes"),
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        **({"cudnn": str(torch.backends.cudnn.version())} if cuda else {}),
        **({"driver": driver.group()} if driver and cuda else {}),
        **{package: version for package in PACKAGES if (version := installed(package))},
        **kitchen(),
        "device": f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}" if cuda else f"{platform.machine()} CPU",
    }


def kitchen() -> dict[str, str]:
    """comfy-kitchen's version, and which of its ways to compute work here: stock's speed depends on it."""
    version = installed("comfy-kitchen")
    if version is None:
        return {}
    import comfy_kitchen

    working = sorted(name for name, way in comfy_kitchen.list_backends().items() if way["available"])
    return {"comfy-kitchen": f"{version} ({', '.join(working)})"}


def memory() -> str:
    """How the GPU's memory is managed in this process, in words; "CPU" without one."""
    import comfy.memory_management
    import torch

    if not torch.cuda.is_available():
        return "CPU"
    allocator = torch.cuda.get_allocator_backend()
    return f"{allocator}, dynamic VRAM" if comfy.memory_management.aimdo_enabled else allocator
