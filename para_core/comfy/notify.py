"""Telling the user: a log line, and a text on the node that is running."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable

from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context

from ..log import log

PAUSE = 0.5  # seconds between two texts of a run's progress


def show(text: str) -> None:
    """Put ``text`` on the running node; nothing happens outside of a server (tests, scripts)."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    context = get_executing_context()
    if context is not None and server is not None:
        # a node that was made while another ran is shown as that other one
        server.send_progress_text(text, get_progress_state().dynprompt.get_display_node_id(context.node_id))


class Notes:
    """Sentences of one sampling run, each said once: in the log, on the node, and kept for the report."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.said: list[str] = []
        self._clock = clock
        self._shown: float | None = None

    def say(self, sentence: str) -> None:
        if sentence and sentence not in self.said:
            self.said.append(sentence)
            log.warning(sentence)
            show("\n".join(self.said))

    def relay(self, sayings: Iterable[tuple[str, str]]) -> None:
        """Say what other ranks have said, (device, sentence), where this one has not said the same."""
        devices: dict[str, list[str]] = {}
        for device, sentence in sayings:
            devices.setdefault(sentence, []).append(device)
        for sentence, there in devices.items():
            if sentence not in self.said:
                self.say(f"On {', '.join(there)}: {sentence}")

    def live(self, line: Callable[[], str]) -> None:
        """Show how far the run is, above what was said; most calls come too early after the last one and cost nothing."""
        now = self._clock()
        if self._shown is None or now - self._shown >= PAUSE:
            self._shown = now
            show("\n".join([line(), *self.said]))
