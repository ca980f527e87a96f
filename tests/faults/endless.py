"""A ComfyUI of its own that samples for ever over the given number of ranks: for tests that kill it.

After the first prompt it prints one line of JSON: its workers' process ids and their private directory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[:1] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from env import comfy_import  # noqa: E402

comfy_import.boot_comfy()

from faults.sampling import Prompt, prepared, sample  # noqa: E402

from para_core.comfy import sidecars  # noqa: E402

prompt = Prompt("wan", ranks=int(sys.argv[1]))
model = prepared(prompt)
sample(model, prompt)
group = sidecars.group()
print(json.dumps({"pids": group.pids, "directory": str(group._pool.directory)}), flush=True)
while True:
    sample(model, prompt)
