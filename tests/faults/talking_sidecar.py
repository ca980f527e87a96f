"""A sidecar that has something to say to the user in every forward: a script for workers, beside the real one."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.remove(str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parents[2]))

from para_core import sidecar  # noqa: E402
from para_core.attention.choice import Chooser  # noqa: E402

begin_forward = Chooser.begin_forward


def begin(self: Chooser) -> None:
    self.say("Nothing is fast on this card.")
    begin_forward(self)


Chooser.begin_forward = begin  # type: ignore[method-assign]

sidecar.main(sys.argv[1])
