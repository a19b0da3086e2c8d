"""Forms batches by planned token count, to limit padding and memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from smolstack.bulk.rows import Row
from smolstack.errors import BulkError

DEFAULT_BATCH_TOKENS, DEFAULT_BATCH_ROWS = 4096, 16
_HELD_BYTES = 64 * 2**20  # image files held in memory while they are sorted
_PADDED = 4  # padding of a row is less than 1/_PADDED of the batch's longest row


@dataclass(frozen=True)
class Limits:
    """The maximum size of a batch.

    Attributes:
        tokens: prompt tokens, padding included; an image that needs more is a batch of its own.
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
    """A row and the number of tokens of its prompt."""

    row: Row
    tokens: int


def chunks(rows: Iterable[Row], held_bytes: int = _HELD_BYTES) -> Iterator[list[Row]]:
    """Yield chunks of rows with at most the given bytes of images (and at least one row)."""
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
    """Yield batches of rows with similar length, longest first.

    If memory is insufficient, the job therefore fails at the beginning.
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
