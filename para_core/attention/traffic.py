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
    def expected(rows: int, width: int, item: int, *, ulysses: int, ring: int) -> float:
        """Bytes a rank sends per self-attention call with even shards: unified attention (arXiv 2405.07719).

        ``rows``: batch times joint tokens; ``width``: heads times head dim; ``item``: bytes an element has.
        Ulysses alone (arXiv 2309.14509) is ``ring=1``, ring alone (arXiv 2310.01889) ``ulysses=1``.
        """
        return rows * width * item / (ulysses * ring) * (4 * (ulysses - 1) / ulysses + 2 * (ring - 1))
