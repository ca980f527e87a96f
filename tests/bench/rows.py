"""One row of a measurement: what goes wrong in it is its result, and the next one is tried."""

from __future__ import annotations

import faulthandler
import gc
import os
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from record import Record, Row


class TimeIsUp(RuntimeError):
    """No further row is begun."""


@contextmanager
def attempt(record: Record, table: str, key: Row, options: Namespace) -> Iterator[Row]:
    """Fill in the row inside the block; it is written when the block ends, and as failed if that raises.

    A block that hangs ends the process after ``options.row_limit`` seconds, and so does a CUDA error, after which nothing works
    any more: whoever started this process starts another for the rows that are left. Raises TimeIsUp at the deadline.
    """
    if time.time() > options.deadline:
        raise TimeIsUp
    row: Row = dict(key)
    record.put(table, {**row, "failed": "the process ended, or took too long"})
    faulthandler.dump_traceback_later(options.row_limit, exit=True)
    started = time.time()
    try:
        yield row
    except Exception as error:  # noqa: BLE001  the table says it, the next row is tried
        traceback.print_exc()
        first = next(iter(str(error).splitlines()), "")
        row = {**key, "failed": f"{type(error).__name__}: {first}"[:200]}
        if "CUDA" in first and not isinstance(error, torch.OutOfMemoryError):
            record.put(table, row)
            print(short(table, row), flush=True)
            sys.stderr.flush()
            os._exit(1)  # an orderly end may wait for the device for ever
    finally:
        faulthandler.cancel_dump_traceback_later()
    record.put(table, {**row, "took_s": round(time.time() - started, 1)})
    print(short(table, row), flush=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def short(table: str, row: Row) -> str:
    """A row as one line."""
    return f"{table}: " + "  ".join(f"{name}={value}" for name, value in row.items() if name not in ("memory", "took_s"))
