"""One thing that was looked at, and every difference that was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from smolstack.errors import SmolstackError


@dataclass
class Check:
    """One thing that was looked at.

    Attributes:
        name: what was looked at.
        found: what it was found to be, in one line.
        problems: every difference, one sentence each.
        remarks: what is unusual and not wrong.
        skipped: whether an earlier difference made it impossible.
    """

    name: str
    found: str = ""
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    skipped: bool = False

    @property
    def state(self) -> str:
        if self.skipped:
            return "skipped"
        return "wrong" if self.problems else "ok"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "state": self.state}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Note an error as a difference instead of ending at it."""
        try:
            yield
        except (SmolstackError, OSError) as error:
            self.problems.append(str(error))
