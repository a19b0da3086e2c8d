"""Before a request is queued: identifying its client, and limiting the number being read."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from fastapi import Request

from smolstack.errors import QueueFullError
from smolstack.generation.costs import SECONDS_PER_GRAMMAR_BYTE, urgency
from smolstack.generation.grammar_limits import INTERSECTING
from smolstack.generation.pools import RankedPool
from smolstack.serve.origins import sent_key
from smolstack.serve.schemas import ChatRequest, VideoPart
from smolstack.serve.settings import ServerSettings

T = TypeVar("T")
_GRACE = 2.0  # seconds in which reading a request is not cancelled in favor of others
_VIDEO = 0.5  # seconds to decode one, approximately
_TRIAL = 0.5  # seconds to build a grammar in a process of its own, approximately
_HEAVY = 0.05  # seconds above which work counts as heavy
_CHARACTER = 1e-6  # seconds to tokenize one


def client_of(request: Request, settings: ServerSettings) -> str:
    """Return the client's name: its API key (hashed) if the server has keys, or its address."""
    if settings.api_keys:
        # By the key alone: blanks and letter case around it do not make another client.
        return hashlib.sha256(sent_key(request.headers)[1]).hexdigest()
    return request.client.host if request.client else ""


def reading_seconds(body: ChatRequest, more: int = 0) -> float:
    """Estimate the seconds needed to tokenize a request's texts and ``more`` characters, and to
    compile its grammar."""
    characters = sum(len(text) for _, text in body.texts()) + more
    choices = body.choices or []
    tokenized = characters * (1 + len(choices)) + sum(map(len, choices))
    videos = sum(isinstance(part, VideoPart) for _, part in body.media_parts())
    seconds = tokenizing_seconds(tokenized) + videos * _VIDEO
    seconds += grammar_bytes(body) * SECONDS_PER_GRAMMAR_BYTE
    if body.grammar is not None or any(map(_intersects, _schemas(body))):
        seconds += _TRIAL
    return seconds


def tokenizing_seconds(characters: int) -> float:
    """Estimate the seconds needed to tokenize a text."""
    return characters * _CHARACTER


def grammar_bytes(body: ChatRequest) -> int:
    """Return the approximate length of a request's expression, grammar, choices and schemas."""
    size = len(body.regex or "") + len(body.grammar or "") + sum(map(len, body.choices or []))
    return size + sum(_characters(schema) for schema in _schemas(body))


def _schemas(body: ChatRequest) -> list[Any]:
    wanted = body.response_format
    schemas: list[Any] = [body.json_schema]
    if wanted is not None:
        schemas += [wanted.schema_, wanted.json_schema and wanted.json_schema.schema_]
    return schemas + [tool.model_dump(exclude_none=True) for tool in body.tools or []]


def _intersects(value: Any) -> bool:
    """Whether a schema has keywords for which its grammar is built in a process first."""
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, dict):
            if not INTERSECTING.isdisjoint(each):
                return True
            left += each.values()
        elif isinstance(each, list):
            left += each
    return False


def _characters(value: Any) -> int:
    total, left = 0, [value]
    while left:
        each = left.pop()
        total += len(each) if isinstance(each, str) else 2
        if isinstance(each, dict):
            left += [*each.keys(), *each.values()]
        elif isinstance(each, list):
            left += each
    return total


async def in_pool(pool: RankedPool, seconds: float, work: Callable[..., T], *args: Any) -> T:
    """Run a function that takes about ``seconds`` in the pool; cheaper work runs first."""
    rank = urgency(time.monotonic(), seconds)
    future = pool.rank(partial(work, *args), rank, heavy=seconds > _HEAVY)
    return await asyncio.wrap_future(future)


class ReadLimiter:
    """Limits the number of requests being read. At the limit, a request of the client with the most
    of them is cancelled in favor of a client with fewer; otherwise the one that has taken longest,
    unless all have just started.

    Args:
        limit: maximum number of requests; None: unlimited.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._reading: dict[asyncio.Task[Any], tuple[str, float]] = {}  # client, start
        self._cancelled: set[asyncio.Task[Any]] = set()

    async def read(self, work: Coroutine[Any, Any, T], client: str) -> T:
        """Await the reading of a client's request and return its result.

        Raises:
            QueueFullError: too many other requests are being read.
        """
        if self.limit is not None and len(self._reading) >= self.limit:
            other = self._cancellable(client)
            if other is None:
                work.close()
                raise QueueFullError(f"{len(self._reading)} other requests are being read")
            del self._reading[other]
            self._cancelled.add(other)
            other.cancel()
        task = asyncio.ensure_future(work)
        self._reading[task] = client, time.monotonic()
        try:
            return await task
        except asyncio.CancelledError:
            task.cancel()
            if task in self._cancelled:
                raise QueueFullError(
                    "reading the request took too long while others were waiting"
                ) from None
            raise
        finally:
            self._reading.pop(task, None)
            self._cancelled.discard(task)

    def _cancellable(self, client: str) -> asyncio.Task[Any] | None:
        """Return the request to cancel in favor of a client's new one; None if there is none."""
        counts = Counter(each for each, _ in self._reading.values())
        if not counts:
            return None
        most = max(counts, key=lambda each: counts[each])
        if counts[most] > counts[client] + 1:
            return next(task for task, (each, _) in self._reading.items() if each == most)
        oldest, (_, start) = next(iter(self._reading.items()))
        return oldest if time.monotonic() - start >= _GRACE else None
