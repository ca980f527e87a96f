"""What a rank computes while the messages of an attention call travel, because it needs nothing of them."""

from __future__ import annotations

from typing import Protocol


class Beside(Protocol):
    """Work that stands beside an attention call. Each part is launched once at most, and where nothing is sent ahead not at all.

    ``operations``: floating-point operations of each part.
    """

    operations: tuple[float, float]

    def there(self) -> None:
        """Launch what is computed while queries, keys and values travel."""

    def back(self) -> None:
        """Launch what is computed while attention's outputs travel."""
