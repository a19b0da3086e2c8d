"""Batches by planned token count: what is padded and what is held at once stay small."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from smolstack.bulk.rows import Row
from smolstack.errors import BulkError

DEFAULT_BATCH_TOKENS, DEFAULT_BATCH_ROWS = 4096, 16
_HELD_BYTES = 64 * 2**20  # image files that are held while they are sorted
_PADDED = 4  # a row is padded by less than one in so many of its batch's longest


@dataclass(frozen=True)
class Limits:
    """How large a batch may become.

    Attributes:
        tokens: prompt tokens, padding included; an image that needs more goes alone.
        rows: images.
    """

    tokens: int = DEFAULT_BATCH_TOKENS
    rows: int = DEFAULT_BATCH_ROWS

    def __post_init__(self) -> None:
        for name, value in (("batch_tokens", self.tokens), ("batch_rows", self.rows)):
            if value < 1:
                raise BulkError(f"{name} is {value}, expected 1 or more")


@dataclass(frozen=True)
class Planned:
    """A row and the tokens that asking about its image takes."""

    row: Row
    tokens: int


def chunks(rows: Iterable[Row], held_bytes: int = _HELD_BYTES) -> Iterator[list[Row]]:
    """Rows in pieces that hold no more than so many bytes of images (and at least one row)."""
    some: list[Row] = []
    held = 0
    for row in rows:
        size = 0 if row.content is None else len(row.content)
        if some and held + size > held_bytes:
            yield some
            some, held = [], 0
        some.append(row)
        held += size
    if some:
        yield some


def batches(planned: Sequence[Planned], limits: Limits) -> Iterator[list[Planned]]:
    """Rows of nearly the same length together, the longest first.

    Too little memory then shows at the beginning, not after hours.
    """
    some: list[Planned] = []
    for entry in sorted(planned, key=lambda entry: -entry.tokens):
        longest = some[0].tokens if some else entry.tokens
        full = len(some) == limits.rows or (len(some) + 1) * longest > limits.tokens
        if some and (full or (longest - entry.tokens) * _PADDED >= longest):
            yield some
            some = []
        some.append(entry)
    if some:
        yield some
