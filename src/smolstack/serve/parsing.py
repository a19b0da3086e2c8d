"""From a body's bytes to JSON, in bounded time, and nothing kept that is not needed.

Parsing holds the interpreter's lock and the server's loop, so what it may take is counted before,
large bodies take turns, and the loop does other things between two of them.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any
from weakref import WeakKeyDictionary

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from smolstack.serve.error_responses import RefusedError

MOST_VALUES = 100_000  # of one body
_LARGE = 2**20
_DEEPEST = 500  # about where Python's reader gives up
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_LONG_NUMBER = re.compile(rb"\d{4000,}")
_SEPARATORS = (b",", b"[", b"{")
_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


class TooDeepError(RecursionError):
    """A body that is nested too deeply, and the place where it is."""

    def __init__(self, place: str) -> None:
        super().__init__(f"nested too deeply at {place}")
        self.place = place


class JsonRequest(Request):
    """A request whose body is parsed once; of its bytes nothing is kept then."""

    _parsed: Any = None
    _error: Exception | None = None

    async def body(self) -> bytes:
        """A stand-in for the bytes of a body that was parsed: FastAPI asks whether there are any,
        and would keep them for as long as its route works."""
        await self.parse()
        return b"" if self._parsed is None and self._error is None else b"{}"

    async def json(self) -> Any:
        """The parsed body.

        Raises:
            json.JSONDecodeError: it is no JSON.
        """
        await self.parse()
        if self._error is not None:
            raise self._error
        return self._parsed

    async def parse(self) -> None:
        """Receive and parse the body.

        Raises:
            RefusedError: it has too many values.
        """
        if self._parsed is not None or self._error is not None:
            return
        content = b"".join([part async for part in self.stream()])
        try:
            self._parsed = await _in_turn(content)
        except RecursionError:
            self._error = TooDeepError(_too_deep(content.decode(errors="replace")))
        except ValueError as error:
            self._error = error.with_traceback(None)

    def forget(self) -> None:
        """Let go of what was parsed."""
        if isinstance(self._parsed, dict):
            self._parsed.clear()


class JsonRoute(APIRoute):
    """A route whose requests are JsonRequests."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle, has_body = super().get_route_handler(), self.body_field is not None

        async def handler(request: Request) -> Response:
            mine = JsonRequest(request.scope, request.receive, request._send)
            if has_body:
                try:
                    await mine.parse()
                except ClientDisconnect:
                    return Response(status_code=499)  # nobody reads it
            return await handle(mine)

        return handler


async def _in_turn(content: bytes) -> Any:
    """Parse; large bodies one after the other, with as much time for others between them."""
    if len(content) < _LARGE:
        return parsed(content)
    loop = asyncio.get_running_loop()
    turn = _turns.setdefault(loop, asyncio.Lock())
    await turn.acquire()
    began = time.perf_counter()
    try:
        return parsed(content)
    finally:
        loop.call_later(time.perf_counter() - began, turn.release)


def parsed(content: bytes) -> Any:
    """JSON as Python's objects.

    Raises:
        json.JSONDecodeError, RecursionError: it is no JSON, or nested too deeply.
        RefusedError: it has too many values.
    """
    if _has_many(content):
        raise RefusedError(413, f"the body has more than {MOST_VALUES:,} JSON values")
    found: Any = None
    if content.strip():
        try:
            found = from_json(content)
        except ValueError:
            found = _parsed_again(content)
    if found is None:
        raise RefusedError(400, "the body is empty, expected a JSON object")
    return found


def _parsed_again(content: bytes) -> Any:
    """The same by Python's reader, which says where it failed and takes half a surrogate pair."""
    try:
        return json.loads(content)
    except json.JSONDecodeError:
        raise
    except UnicodeDecodeError as error:
        why, before = f"it is not valid {error.encoding}", content[: error.start]
    except ValueError:
        number = _LONG_NUMBER.search(content)
        why = f"a number has more than {sys.get_int_max_str_digits():,} digits"
        before = content[: number.start() if number else 0]
    place = len(before.decode(errors="replace"))
    raise json.JSONDecodeError(why, content.decode(errors="replace"), place)


def _has_many(content: bytes) -> bool:
    """Whether there are more values than are parsed; separators inside strings do not count."""
    if _separators(content) <= MOST_VALUES:
        return False
    place = values = strings = 0
    while values <= MOST_VALUES and strings <= 2 * MOST_VALUES:
        found = _STRING.search(content, place)
        values += _separators(content[place : found.start() if found else len(content)])
        if found is None:
            return values > MOST_VALUES
        place, strings = found.end(), strings + 1
    return True


def _separators(part: bytes) -> int:
    return sum(part.count(each) for each in _SEPARATORS)


def line_and_column(body: str, place: int) -> str:
    """Where a character of a body is."""
    before = body[:place]
    return f"line {before.count(chr(10)) + 1}, column {place - (before.rfind(chr(10)) + 1) + 1}"


def _too_deep(body: str) -> str:
    """Where a body's brackets are nested deeper than anything that is asked for here."""
    depth = 0
    for found in re.finditer(r'"(?:\\.|[^"\\])*"|[\[{]|[\]}]', body):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth == _DEEPEST:
            return line_and_column(body, found.start())
    return line_and_column(body, len(body))
