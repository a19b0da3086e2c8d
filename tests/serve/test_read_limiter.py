"""The limit of requests being read is shared among clients."""

from __future__ import annotations

import asyncio
import re

import pytest

from smolstack.errors import QueueFullError
from smolstack.serve.admission import ReadLimiter


async def refusals(limiter: ReadLimiter, clients: list[str]) -> list[str]:
    """Read a request of each client, all at the same time; return the message of each refusal."""
    everyone_began = asyncio.Event()

    async def reading() -> str:
        await everyone_began.wait()
        return "read"

    tasks = []
    for client in clients:
        tasks.append(asyncio.create_task(limiter.read(reading(), client)))
        for _ in range(3):
            await asyncio.sleep(0)  # lets the request begin
    everyone_began.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(each, (str, QueueFullError)) for each in results)
    return [str(each) for each in results]


def test_a_client_that_has_many_requests_read_makes_room_for_another() -> None:
    first, *others, last = asyncio.run(refusals(ReadLimiter(3), ["much", "much", "much", "once"]))
    assert re.search("while others were waiting", first)
    assert [*others, last] == ["read"] * 3


@pytest.mark.parametrize("clients", [["a"] * 4, ["a", "a", "b", "b"], ["a", "b", "c", "d"]])
def test_clients_with_equal_shares_do_not_cancel_each_other(clients: list[str]) -> None:
    *others, last = asyncio.run(refusals(ReadLimiter(3), clients))
    assert others == ["read"] * 3
    assert last == "3 other requests are being read"
