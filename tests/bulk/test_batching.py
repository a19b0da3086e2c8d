"""Batches: everything in one of them, little padded, none too large."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event, active_count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolstack.bulk.batching import Limits, Planned, batches, chunks
from smolstack.bulk.local_engine import load_ahead
from smolstack.bulk.rows import Row


@given(
    st.lists(st.integers(1, 1500), max_size=60),
    st.integers(100, 5000),
    st.integers(1, 20),
)
def test_rows_are_batched_once_within_the_limits_and_padded_by_less_than_a_quarter(
    tokens: list[int], most: int, rows: int
) -> None:
    planned = [Planned(Row(index, str(index)), count) for index, count in enumerate(tokens)]
    made = list(batches(planned, Limits(most, rows)))
    assert sorted(e.row.index for batch in made for e in batch) == list(range(len(tokens)))
    for batch in made:
        longest = max(entry.tokens for entry in batch)
        assert len(batch) <= rows
        assert len(batch) == 1 or longest * len(batch) <= most
        assert all(entry.tokens > longest * 3 / 4 for entry in batch)


def test_image_files_are_not_held_without_bound() -> None:
    rows = [Row(index, "", content=bytes(10)) for index in range(7)]
    assert [len(some) for some in chunks(rows, held_bytes=25)] == [2, 2, 2, 1]
    assert [len(some) for some in chunks(rows, held_bytes=1)] == [1] * 7


def test_one_item_is_made_ahead_and_no_more() -> None:
    made: list[int] = []
    third = Event()

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            if number == 2:
                third.set()
            yield number

    ahead = load_ahead(items())
    assert next(ahead) == 0
    assert third.wait(10)  # one waits, the next is made
    assert next(ahead) == 1
    threads = active_count()
    ahead.close()
    assert active_count() == threads - 1
    assert len(made) < 10


def test_what_goes_wrong_in_the_thread_comes_out() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError

    ahead = load_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(ZeroDivisionError):
        next(ahead)
