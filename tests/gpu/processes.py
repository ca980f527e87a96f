"""Cases that are processes of their own, the rows they put, and the table of them all.

A row is a list of words: the case, what it did, "ok" or not, figures, and notes last. A case puts each as soon as it is known.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

ROW = "ROW "
SHOWN = 100  # lines of a case that went wrong


def put(*row: str) -> None:
    """In a case: one row."""
    print(ROW + json.dumps(row), flush=True)


class Process:
    """A case that runs. ``rows`` and other ``lines`` that it has printed so far; ``said``: rows are also printed as they come."""

    def __init__(self, call: Sequence[str], environment: Mapping[str, str], *, said: bool = True):
        self.rows: list[list[str]] = []
        self.lines: list[str] = []
        self._said = said
        self._process = subprocess.Popen(
            call,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONFAULTHANDLER": "1", **environment},
            start_new_session=True,
        )
        # a thread, because whoever outlives the case keeps the pipe open
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ROW):
                self.rows.append(json.loads(line.removeprefix(ROW)))
                if self._said:
                    print("  ".join(self.rows[-1]), flush=True)
            else:
                self.lines.append(line.rstrip())

    def end(self, limit: float) -> str:
        """Wait for so many seconds, end what is left of it, and return its exit code, or "late"."""
        try:
            code = str(self._process.wait(limit))
        except subprocess.TimeoutExpired:
            code = "late"
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(5)
        return code


def run(call: Sequence[str], names: Sequence[str], heads: Mapping[str, int], *, limit: float, jobs: int) -> list[list[str]]:
    """Rows of the cases: ``call`` with "--case" and each name, so many ``jobs`` at a time, each for at most ``limit`` seconds."""
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        found = pool.map(lambda name: outcome([*call, "--case", name], name, heads, limit), names)
        return [row for rows in found for row in rows]


def outcome(call: Sequence[str], name: str, heads: Mapping[str, int], limit: float) -> list[list[str]]:
    """Rows of one case; what went wrong is one."""
    # where both ranks use one card, NCCL takes it for a mistake unless they seem to be on two machines
    process, started = Process(call, {"NCCL_HOSTID": "paradit-rank0", "TORCHINDUCTOR_COMPILE_THREADS": "3"}), time.time()
    code = process.end(limit)
    if code != "0" or not process.rows:
        last = next((line for line in reversed(process.lines) if line.strip()), "")
        process.rows.append(failed(name, "-", heads, f"ended with {code}: {last[:150]}"))
    wrong = any(row[2] != "ok" for row in process.rows)
    text = [f"== {name}: ended with {code} after {time.time() - started:.0f} s", *(process.lines[-SHOWN:] if wrong else [])]
    print("\n".join(text), flush=True)
    return process.rows


def failed(name: str, what: str, heads: Mapping[str, int], why: str) -> list[str]:
    """The row of a case, or a part of it, that has nothing else to tell."""
    return [name, what, "FAIL", *["-"] * (len(heads) - 3), why.replace("\n", " ")[:200]]


def table(heads: Mapping[str, int], rows: Sequence[Sequence[str]], started: float) -> int:
    """Print all rows and return how many are not ok.

    ``heads``: the columns, notes apart, and how wide they are. ``started``: seconds since 1970.
    """
    print("\n" + " ".join(f"{head:{width}}" for head, width in heads.items()) + " notes")
    for row in rows:
        print(" ".join(f"{value:{width}}" for value, width in zip(row, [*heads.values(), 0], strict=False)))
    wrong = sum(row[2] != "ok" for row in rows)
    print(f"{time.time() - started:.0f} s, {wrong} of {len(rows)} not ok")
    return wrong
