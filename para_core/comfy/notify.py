"""Telling the user: a log line, and a text on the node that is running."""

from __future__ import annotations

import sys

from comfy_execution.utils import get_executing_context

from ..log import log


def show(text: str) -> None:
    """Put ``text`` on the running node; nothing happens outside of a server (tests, scripts)."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    context = get_executing_context()
    if context is not None and server is not None:
        server.send_progress_text(text, context.node_id)


class Notes:
    """Sentences of one sampling run, each said once: in the log, on the node, and kept for the report."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, sentence: str) -> None:
        if sentence and sentence not in self.said:
            self.said.append(sentence)
            log.warning(sentence)
            show("\n".join(self.said))
