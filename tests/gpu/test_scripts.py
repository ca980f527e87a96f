"""The scripts for machines with a GPU run without one too, so that they are known to work when there is one."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpu import processes

HERE = Path(__file__).resolve().parent
HEADS = {"case": 8, "what": 8, "ok": 4, "figure": 8}
ROW = ["case", "one", "ok", "1.0", ""]
ENDINGS = {
    "well": ("", ""),
    "with an error": ("raise OSError('no such thing')", "ended with 1: OSError: no such thing"),
    "killed": ("os.kill(os.getpid(), 9)", "ended with -9: it goes on"),
}


def call(last: str) -> list[str]:
    """A case that puts its row, and then does this."""
    return [sys.executable, "-c", f"import os, time; print('ROW ' + {json.dumps(ROW)!r}); print('it goes on', flush=True); {last}"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_case_that_ends_badly_keeps_its_rows_and_adds_one(ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    last, why = ENDINGS[ending]
    found = processes.outcome(call(last), "case", HEADS, 60)
    assert found == [ROW] + [["case", "-", "FAIL", "-", why]] * bool(why)
    assert processes.table(HEADS, found, 0.0) == bool(why)
    assert f"{len(why) > 0:d} of {len(found)} not ok" in capsys.readouterr().out


def test_a_case_that_does_not_end_is_ended_and_its_rows_are_known_before() -> None:
    process = processes.Process(call("time.sleep(600)"), {})
    while not process.lines:
        time.sleep(0.01)
    assert process.rows == [ROW] and process.end(0.0) == "late"


def test_a_case_without_rows_is_not_ok() -> None:
    assert [row[2] for row in processes.outcome([sys.executable, "-c", ""], "case", HEADS, 60)] == ["FAIL"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("script", "names"),
    [
        ("faults", ["off", "--only", "memory"]),
        ("memory", ["growth, two ranks"]),
        ("modes", ["default"]),
        ("ranks", ["4"]),
        ("server", ["default"]),
        ("weights", ["classic"]),
    ],
    ids=["faults", "memory", "modes", "ranks", "server", "weights"],
)
def test_the_script_s_cpu_form_finds_nothing_wrong(script: str, names: list[str]) -> None:
    form = [sys.executable, str(HERE / f"{script}.py"), "--cpu", *names]
    done = subprocess.run(form, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and ", 0 of " in done.stdout.splitlines()[-1], done.stdout[-3000:] + done.stderr[-3000:]
