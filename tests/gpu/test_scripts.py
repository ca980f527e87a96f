"""The scripts for machines with a GPU run without one too, so that they are known to work when there is one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("script", "names"),
    [("faults", ["off", "--only", "memory"]), ("modes", ["default"]), ("server", ["default"])],
    ids=["faults", "modes", "server"],
)
def test_the_script_s_cpu_form_finds_nothing_wrong(script: str, names: list[str]) -> None:
    call = [sys.executable, str(HERE / f"{script}.py"), "--cpu", *names]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and ", 0 of " in done.stdout.splitlines()[-1], done.stdout[-3000:] + done.stderr[-3000:]
