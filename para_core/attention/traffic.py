"""Count what attention sends, to compare with the formulas of the papers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Traffic:
    """Bytes this rank has sent to other ranks (what stays on the rank is not counted)."""

    calls: int = 0
    bytes: int = 0
    """q, k, v and outputs."""
    mask_bytes: int = 0

    @staticmethod
    def expected(rows: int, width: int, item: float, *, ulysses: int, ring: int, wire: float | None = None) -> float:
        """Bytes a rank sends per self-attention call with even shards: unified attention (arXiv 2405.07719).

        ``rows``: batch times joint tokens; ``width``: heads times head dim; ``item``: bytes an element has.
        ``wire``: bytes an element of q, k and v has on its way (1 + 4 / head dim where quantised), None for ``item``.
        Ulysses alone (arXiv 2309.14509) is ``ring=1``, ring alone (arXiv 2310.01889) ``ulysses=1``.
        """
        there = item if wire is None else wire
        return rows * width / (ulysses * ring) * ((3 * there + item) * (ulysses - 1) / ulysses + 2 * there * (ring - 1))
