from __future__ import annotations

from env.fewer_threads import one_thread

__all__ = ["one_thread"]
