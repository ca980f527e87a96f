"""What a full run of the matrix found, as the file RESULT.json beside this one."""

from __future__ import annotations

import datetime
import json
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path

from .axes import AXES, excluded
from .covering import pairs
from .plan import RUNS
from .runs import Outcome, Run

RESULT = Path(__file__).with_name("RESULT.json")


@dataclass
class Recorder:
    outcomes: dict[Run, Outcome] = field(default_factory=dict)

    def write(self, seconds: float) -> None:
        """Raises ``AssertionError`` unless every run has come to an end."""
        missing = [run for run in RUNS if run not in self.outcomes]
        assert not missing, f"{RESULT.name} is not written: {len(missing)} of {len(RUNS)} runs did not pass, the first: {missing[0]}"
        RESULT.write_text(json.dumps(self.result(seconds), indent=2) + "\n")

    def result(self, seconds: float) -> dict:
        import comfyui_version
        import torch

        table = pairs(AXES, excluded)
        reasons: dict[str, int] = {}
        for one, others in table.items():
            for other, reason in others.items():
                if reason and one < other:
                    reasons[reason] = reasons.get(reason, 0) + 1
        worst: dict[str, float] = {}
        for outcome in self.outcomes.values():
            worst[outcome.family] = max(worst.get(outcome.family, 0.0), outcome.error)
        ran: dict[str, int] = {}
        for outcome in self.outcomes.values():
            degrees = f"{outcome.degrees.batch} x {outcome.degrees.ring} x {outcome.degrees.ulysses}"
            ran[degrees] = ran.get(degrees, 0) + 1
        return {
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "versions": {"ComfyUI": comfyui_version.__version__, "torch": torch.__version__, "Python": platform.python_version()},
            "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, float32",
            "runs": len(RUNS),
            "seconds": round(seconds),
            "values of each axis": {axis: len(values) for axis, values in AXES.items()},
            "pairs of values covered": sum(not reason for others in table.values() for reason in others.values()) // 2,
            "pairs left out, by reason": dict(sorted(reasons.items())),
            "runs by degrees (batch x ring x ulysses)": dict(sorted(ran.items())),
            "largest relative error": {family: float(f"{error:.2g}") for family, error in sorted(worst.items())},
        }
