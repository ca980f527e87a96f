"""The scripts for machines with a GPU run without one too, so that they are known to work when there is one."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpu import at_once, first, processes

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


def test_what_to_run_first_ends_with_what_fails_unless_all_is_asked_for(capfd, monkeypatch) -> None:
    def says(code: int, *environment: tuple[str, str]) -> first.Part:
        call = ("-c", f"import os, sys; print('P2P', os.environ.get('NCCL_P2P_DISABLE'), os.environ['NCCL_DEBUG']); sys.exit({code})")
        return first.Part(("-c", "raise OSError"), call, environment)

    monkeypatch.delenv("NCCL_DEBUG", raising=False)
    monkeypatch.setattr(first, "PARTS", {"one": says(0), "two": says(3, *first.HOST.items()), "three": says(0)})
    assert first.main(["--cpu"]) == 1
    said = capfd.readouterr().out
    assert "P2P None WARN" in said and "P2P 1 WARN" in said and "FAIL (3)" in said and "three" not in said
    assert first.main(["--cpu", "--all"]) == 1 and first.main(["--cpu", "three"]) == 0
    assert "three" in capfd.readouterr().out


def test_lanes_run_side_by_side_take_turns_and_end_in_time(tmp_path: Path, capsys, monkeypatch) -> None:
    def says(name: str, code: str, *, timed: bool = False) -> at_once.Command:
        return at_once.Command(name, ("-c", f"import sys; {code}"), timed=timed)

    record = "open(sys.argv[sys.argv.index('--out') + 1] + '/record', 'w').write(' '.join(sys.argv))"
    monkeypatch.setattr(at_once, "TIMED", {"one": (says("fails", "sys.exit(3)"), says("timed", record, timed=True))})
    right = {"two": (says("hangs", "import time; time.sleep(60)"), says("late", "pass")), "three": (says("goes-on", "print('well')"),)}
    monkeypatch.setattr(at_once, "RIGHT", right)
    began = time.monotonic()
    assert at_once.main(["--out", str(tmp_path), "--minutes", "0.1", "--commit", "abc"]) == 3
    assert time.monotonic() - began < 30
    said = capsys.readouterr().out
    assert "FAIL (3)" in said and "FAIL (late)" in said and "no time was left" in said
    assert (tmp_path / "goes-on" / "log").read_text() == "well\n"
    words = (tmp_path / "timed" / "record").read_text()
    assert f"--turns {tmp_path / 'turns'}" in words and words.endswith("--commit abc")
    assert at_once.main(["--out", str(tmp_path / "again"), "one"]) == 1 and not (tmp_path / "again" / "goes-on").exists()


def test_what_to_run_first_is_what_the_page_lists() -> None:
    page = (HERE / "README.md").read_text()
    for part in first.PARTS.values():
        words = [*(f"{name}={value}" for name, value in part.environment), "python", *part.command]
        assert f". `{' '.join(words)}`" in page


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
