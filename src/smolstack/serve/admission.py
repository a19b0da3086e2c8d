"""Before a request is queued: identifying its client, and limiting the number being read."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from fastapi import Request

from smolstack.errors import QueueFullError
from smolstack.generation.form_limits import INTERSECTING
from smolstack.generation.pools import RankedPool
from smolstack.serve.origins import sent_key
from smolstack.serve.schemas import ChatRequest
from smolstack.serve.settings import ServerSettings

T = TypeVar("T")
_GRACE = 2.0  # seconds in which reading a request is not cancelled in favor of others
_PATIENCE = 4.0  # seconds that work waits for cheaper work, per second of its own cost
_VIDEO = 0.5  # seconds to decode one, approximately
_TRIAL = 0.5  # seconds to build a grammar in a process of its own, approximately
_HEAVY = 0.05  # seconds above which work counts as heavy
_CHARACTER, _FORM = (
    1e-6,
    1e-5,
)  # seconds to tokenize a character, and to compile a byte of a grammar


def client_of(request: Request, settings: ServerSettings) -> str:
    """Return the client's name: its API key (hashed) if the server has keys, or its address."""
    if settings.api_keys:
        # By the key alone: blanks and letter case around it do not make another client.
        return hashlib.sha256(sent_key(request.headers)[1]).hexdigest()
    return request.client.host if request.client else ""


def reading_seconds(body: ChatRequest, more: int = 0) -> float:
    """Estimate the seconds needed to tokenize a request's texts and ``more`` characters, and to
    compile its grammar."""
    texts = [
        part if isinstance(part, str) else getattr(part, "text", "")
        for message in body.messages
        for part in ([message.content] if isinstance(message.content, str) else message.content)
    ]
    characters = sum(map(len, texts)) + more
    choices = body.choices or []
    seconds = (characters * (1 + len(choices)) + sum(map(len, choices))) * _CHARACTER
    videos = sum(
        getattr(part, "type", "") == "video_url"
        for message in body.messages
        for part in message.content
    )
    seconds += form_bytes(body) * _FORM + videos * _VIDEO
    if body.grammar is not None or any(map(_intersects, _schemas(body))):
        seconds += _TRIAL
    return float(seconds)


def form_bytes(body: ChatRequest) -> int:
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
    rank = time.monotonic() + _PATIENCE * seconds
    future = pool.rank(partial(work, *args), rank, heavy=seconds > _HEAVY)
    return await asyncio.wrap_future(future)


class ReadLimiter:
    """Limits the number of requests being read. At the limit, the one that has taken longest is
    cancelled, unless all have just started.

    Args:
        limit: maximum number of requests; None: unlimited.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._reading: dict[asyncio.Task[Any], float] = {}
        self._cancelled: set[asyncio.Task[Any]] = set()

    async def read(self, work: Coroutine[Any, Any, T]) -> T:
        """Await the reading of a request and return its result.

        Raises:
            QueueFullError: too many other requests are being read.
        """
        if self.limit is not None and len(self._reading) >= self.limit:
            oldest = next(iter(self._reading), None)
            if oldest is None or time.monotonic() - self._reading[oldest] < _GRACE:
                work.close()
                raise QueueFullError(f"{len(self._reading)} other requests are being read")
            del self._reading[oldest]
            self._cancelled.add(oldest)
            oldest.cancel()
        task = asyncio.ensure_future(work)
        self._reading[task] = time.monotonic()
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
