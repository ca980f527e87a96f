"""A sidecar that counts what it holds: a script for workers, beside the real one.

When a run has ended and the file that $COUNTS names is there and empty, it writes there what ``counts.count`` says, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.remove(str(Path(__file__).resolve().parent))
sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
sys.path.append(str(Path(__file__).resolve().parents[2]))

from faults.counts import count  # noqa: E402

from para_core import sidecar  # noqa: E402
from para_core.group.worker import Worker  # noqa: E402

COUNTS = Path(os.environ["COUNTS"])
on_end = Worker.on_end


def end(self, payload) -> None:
    on_end(self, payload)
    if COUNTS.exists() and not COUNTS.stat().st_size:
        counted = COUNTS.with_suffix(".new")
        counted.write_text(json.dumps(count()))
        counted.replace(COUNTS)


Worker.on_end = end

sidecar.main(sys.argv[1])
