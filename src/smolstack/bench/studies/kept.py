"""The rows of a study, kept while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]


class Kept:
    """Tables of rows; those of an interrupted study need not be measured again.

    Args:
        earlier: an interrupted study's tables.
        after: called with all tables when rows have been added.
    """

    def __init__(
        self,
        earlier: Mapping[str, Sequence[Row]] | None = None,
        after: Callable[[dict[str, list[Row]]], object] | None = None,
    ) -> None:
        self.tables = {title: list(rows) for title, rows in (earlier or {}).items()}
        self._after = after

    def add(self, title: str, rows: Iterable[Row]) -> None:
        """Append rows to a table."""
        self.tables.setdefault(title, []).extend(rows)
        if self._after is not None:
            self._after(self.tables)

    def has(self, title: str, **values: object) -> bool:
        """Return whether a table has a row with these values."""
        rows = self.tables.get(title, ())
        return any(all(row.get(name) == values[name] for name in values) for row in rows)
