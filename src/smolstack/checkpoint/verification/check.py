"""The result of one check: the differences that it found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from smolstack.errors import SmolstackError


@dataclass
class Check:
    """The result of one check.

    Attributes:
        name: name of the check.
        found: summary of what was found, in one line.
        problems: every difference, one sentence each.
        remarks: unusual but valid findings.
        skipped: whether an earlier difference prevented the check.
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
        """Record an error raised in the block as a difference."""
        try:
            yield
        except (SmolstackError, OSError) as error:
            self.problems.append(str(error))
