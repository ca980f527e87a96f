"""The pack's one logger: every line carries the prefix ``[ParaDiT]``."""

import logging


class _Prefixed(logging.LoggerAdapter):
    def process(self, msg, kwargs):
        return f"[ParaDiT] {msg}", kwargs


log = _Prefixed(logging.getLogger("paradit"), {})
