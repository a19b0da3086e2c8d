"""JSON parsing and validation of request bodies in bounded time, without keeping the bytes.

Parsing blocks the interpreter and the event loop. The number of values is therefore checked first,
and large bodies are parsed one at a time, with time for other work in between. Bodies of many
values are validated in a thread, one at a time.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from smolstack.serve import strict_json
from smolstack.serve.error_responses import RefusedError
from smolstack.serve.strict_json import MOST_VALUES, StrictJsonError

_LARGE = 2**20
_MANY_VALUES = 1000  # validated faster than a thread begins
_DEEPEST = 500  # approximate limit of Python's parser
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_LONG_NUMBER = re.compile(rb"\d{4000,}")
_SEPARATORS = (b",", b"[", b"{")
_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


class TooDeepError(RecursionError):
    """A body is nested too deeply, at this place."""

    def __init__(self, place: str) -> None:
        super().__init__(f"nested too deeply at {place}")
        self.place = place


class JsonRequest(Request):
    """A request whose body is parsed once and whose bytes are then freed."""

    _parsed: Any = None
    _error: Exception | None = None
    _has_many_values = False

    async def body(self) -> bytes:
        """Return a substitute for the bytes: FastAPI only checks whether the body is empty, but
        would keep the bytes while the route runs."""
        await self.parse()
        return b"" if self._parsed is None and self._error is None else b"{}"

    async def json(self) -> Any:
        """Return the parsed body.

        Raises:
            json.JSONDecodeError: the body is not valid JSON.
        """
        await self.parse()
        if self._error is not None:
            raise self._error
        return self._parsed

    async def parse(self) -> None:
        """Receive and parse the body.

        Raises:
            RefusedError: the body has too many values.
        """
        if self._parsed is not None or self._error is not None:
            return
        content = b"".join([part async for part in self.stream()])
        self._has_many_values = _separators(content) > _MANY_VALUES
        try:
            self._parsed = await _in_turn(content)
        except RecursionError:
            self._error = TooDeepError(_too_deep(content.decode(errors="replace")))
        except ValueError as error:
            self._error = error.with_traceback(None)

    async def validate(self, field: Any) -> None:
        """Replace a parsed body of many values by the validated one, which the route only passes
        on.

        Args:
            field: FastAPI's description of the body.

        Raises:
            RequestValidationError, RefusedError: it is invalid.
        """
        if not self._has_many_values or self._parsed is None:
            return
        async with _turn():
            check = partial(field.validate, self._parsed, {}, loc=("body",))
            found, errors = await asyncio.to_thread(check)
        if errors:
            raise RequestValidationError(errors, body=self._parsed)
        self._parsed = found

    def release_body(self) -> None:
        """Free the parsed body."""
        if isinstance(self._parsed, dict):
            self._parsed.clear()


class JsonRoute(APIRoute):
    """A route that receives JsonRequest objects."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle, field = super().get_route_handler(), self.body_field

        async def handler(request: Request) -> Response:
            mine = JsonRequest(request.scope, request.receive, request._send)
            if field is not None:
                try:
                    await mine.parse()
                    await mine.validate(field)
                except ClientDisconnect:
                    return Response(status_code=499)  # disconnected
            return await handle(mine)

        return handler


async def _in_turn(content: bytes) -> Any:
    """Parse a body; after a large one, wait as long as it took before parsing the next."""
    if len(content) < _LARGE:
        return parse_json(content)
    async with _turn():
        began = time.perf_counter()
        try:
            return parse_json(content)
        finally:
            await asyncio.sleep(time.perf_counter() - began)


def _turn() -> asyncio.Lock:
    """The event loop's lock for work on large bodies."""
    return _turns.setdefault(asyncio.get_running_loop(), asyncio.Lock())


def parse_json(content: bytes) -> Any:
    """Parse JSON.

    Raises:
        json.JSONDecodeError, RecursionError: the body is not valid JSON, or nested too deeply.
        RefusedError: the body has too many values, a repeated key, a number that is not finite, or
            is not in UTF-8.
    """
    if _has_many(content):
        raise RefusedError(413, f"the body has more than {MOST_VALUES:,} JSON values")
    found: Any = None
    coding = json.detect_encoding(content)
    if not coding.startswith("utf-8"):
        # Others hide the values from being counted, and are not JSON between programs (RFC 8259).
        raise RefusedError(400, f"the body is in {coding.upper()}, expected UTF-8")
    if content.strip():
        try:
            found = from_json(content)
        except ValueError:
            found = _parsed_again(content)
        try:
            strict_json.check(found, content)
        except StrictJsonError as error:
            raise RefusedError(400, str(error), param=error.place) from None
    if found is None:
        raise RefusedError(400, "the body is empty, expected a JSON object")
    return found


def _parsed_again(content: bytes) -> Any:
    """Parse again with Python's parser, which gives the position of an error and accepts lone
    surrogates."""
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
    """Whether there are more than MOST_VALUES values, not counting separators in strings."""
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
    """Return the line and column of a character of a body."""
    before = body[:place]
    return f"line {before.count(chr(10)) + 1}, column {place - (before.rfind(chr(10)) + 1) + 1}"


def _too_deep(body: str) -> str:
    """Return where a body's brackets are nested too deeply."""
    depth = 0
    for found in re.finditer(r'"(?:\\.|[^"\\])*"|[\[{]|[\]}]', body):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth == _DEEPEST:
            return line_and_column(body, found.start())
    return line_and_column(body, len(body))
