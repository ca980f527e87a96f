"""What the nodes set: frozen, attached to a model's options, merged once for every sampling run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Parallel:
    """Split steps across ranks. 0 means choose; ``devices`` like "0,2", empty: the visible ones after the model's own."""

    gpus: int = 0
    batch_degree: int = 0
    ulysses_degree: int = 0
    ring_degree: int = 0
    devices: str = ""
    careful: bool = False
    """Split only where a forecast says that it pays."""


@dataclass(frozen=True)
class Attention:
    """The local attention kernel by name (see ``para_core.attention.backends``), ``auto`` or ``exact``."""

    backend: str = "auto"


@dataclass(frozen=True)
class Compile:
    """How blocks run: ``off``, ``compile``, ``graph`` or ``compile+graph``."""

    mode: str = "compile+graph"

    @property
    def blocks(self) -> bool:
        return "compile" in self.mode

    @property
    def graph(self) -> bool:
        return "graph" in self.mode


@dataclass(frozen=True)
class Accelerate:
    """What the one node for most people sets; the settings above and below win over it."""

    gpus: int = 0
    attention: str = "auto"
    cache: str = "balanced"
    compile: str = "auto"


@dataclass(frozen=True)
class Cache:
    """First Block Cache. Percentages are of the sampling schedule; ``max_consecutive_hits`` -1: no limit, 0: never.

    rule: ``classic`` (the first block's change since the last computed step) or ``forecast`` (what a step foretold from
    the results before it is expected to be wrong by; it has its own predictor).
    """

    threshold: float = 0.08
    start_percent: float = 0.0
    end_percent: float = 1.0
    max_consecutive_hits: int = -1
    predictor: str = "reuse"
    rule: str = "classic"

    def never(self) -> str:
        """Why there is no step that these settings allow to be skipped, though they do not turn the cache off; "" if there may be."""
        if self.start_percent < self.end_percent:
            return ""
        return f"start_percent {self.start_percent:g} is not below end_percent {self.end_percent:g}"
