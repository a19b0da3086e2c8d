"""Middleware for access control and for the size and time limits of request bodies."""

from __future__ import annotations

import asyncio
import hmac
import re
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smolstack.serve import origins
from smolstack.serve.body_memory import CURRENT, BodyMemory, IncomingBody
from smolstack.serve.error_responses import RefusedError
from smolstack.serve.settings import ServerSettings

_HEADER_BYTES = 64 * 2**10
_JSON = re.compile(r"application/([^\s/]+\+)?json")
_ONCE = ("authorization", "content-encoding", "content-type", "host", "origin")
OPEN = ("/", "/page.js", "/page.css", "/health")  # routes that need no key


class Guard:
    """ASGI middleware that refuses requests without a valid key, from other sites' pages, with a
    wrong host name, with bodies that are not JSON, and with bodies that are too large or slow.

    Args:
        count: called with the route and the status of each response.
        bodies: limits the memory of all requests' bodies.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        count: Callable[[str, int], None],
        bodies: BodyMemory | None = None,
    ) -> None:
        self.app, self.settings, self.count = app, settings, count
        self.bodies = bodies or BodyMemory(settings.bodies_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, limit = Headers(scope=scope), self.settings.body_bytes
        if scope.get("method") == "HEAD":  # uvicorn omits the body of the response
            scope = {**scope, "method": "GET"}
        received = 0
        until, complete = time.monotonic() + self.settings.body_seconds, False
        answered = False

        async def sending(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                path = getattr(scope.get("route"), "path", "other")
                self.count(path, message["status"])
            await send(message)

        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await refusal.response()(scope, receive, sending)
            return
        if "content-type" not in headers:
            named = (b"content-type", b"application/json")
            scope = {**scope, "headers": [*scope["headers"], named]}

        incoming = self.bodies.begin()

        async def counted() -> Message:
            nonlocal received, complete
            if complete:  # the next message is the client's disconnecting, at any time
                return await receive()
            message = await self._received(receive, incoming, until)
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if received > limit:
                    raise _BodyError(self._too_large())
                try:
                    await incoming.take(len(message.get("body", b"")), until)
                except RefusedError as error:
                    raise _BodyError(error) from None
                if complete:
                    incoming.complete()
            return message

        current = CURRENT.set(incoming)
        try:
            await self.app(scope, counted, sending)
        except _BodyError as error:
            if not answered:
                await error.refusal.response()(scope, receive, sending)
        finally:
            CURRENT.reset(current)
            incoming.close()

    async def _received(self, receive: Receive, incoming: IncomingBody, until: float) -> Message:
        """Receive the next part of a body, unless it is too slow or the body is refused."""
        coming = asyncio.ensure_future(receive())
        refused = asyncio.ensure_future(incoming.refused.wait())
        try:
            await asyncio.wait(
                {coming, refused},
                timeout=max(0.0, until - time.monotonic()),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if coming.done():
                return coming.result()
        finally:
            coming.cancel()
            refused.cancel()
        raise _BodyError(incoming.refusal or self._too_slow())

    def _refusal(self, scope: Scope, headers: Headers) -> RefusedError | None:
        wrong = _wrong_headers(scope, headers) or origins.refusal(headers, self.settings)
        if wrong is not None:
            return wrong
        if self.settings.api_keys and scope["path"] not in OPEN and not self._has_key(headers):
            return RefusedError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )
        kind = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if scope.get("method") == "POST" and not _JSON.fullmatch(kind):
            return RefusedError(
                415, f"Content-Type is {kind[:100]}, expected application/json",
                headers={"Connection": "close"},
            )  # fmt: skip
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self.settings.body_bytes:
            return self._too_large()
        return None

    def _has_key(self, headers: Headers) -> bool:
        scheme, sent = origins.sent_key(headers)
        # All keys are compared, each in constant time.
        fitting = [hmac.compare_digest(sent, key.encode()) for key in self.settings.api_keys]
        return scheme == "bearer" and any(fitting)

    def _too_large(self) -> RefusedError:
        return RefusedError(
            413,
            f"the body is larger than the maximum of {self.settings.body_bytes:,} bytes",
            headers={"Connection": "close"},
        )

    def _too_slow(self) -> RefusedError:
        return RefusedError(
            408,
            f"the body did not arrive within {self.settings.body_seconds:g} s",
            headers={"Connection": "close"},
        )


def _wrong_headers(scope: Scope, headers: Headers) -> RefusedError | None:
    """Return a refusal of headers that are too large or repeated, or that give a body two
    lengths."""
    size = sum(len(name) + len(value) for name, value in headers.raw)
    size += len(scope.get("raw_path", b"")) + len(scope.get("query_string", b""))
    if size > _HEADER_BYTES:
        return RefusedError(
            431,
            f"the headers have {size:,} bytes, at most {_HEADER_BYTES:,} are accepted",
            headers={"Connection": "close"},
        )
    for name in _ONCE:
        if len(headers.getlist(name)) > 1:
            # Which of them counts is not the same in every program on the way.
            return RefusedError(
                400, f"found {len(headers.getlist(name))} {name} headers, expected one",
                headers={"Connection": "close"},
            )  # fmt: skip
    coding = headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("identity", ""):
        return RefusedError(
            415, f"Content-Encoding is {coding[:100]}, expected a body without it",
            headers={"Connection": "close"},
        )  # fmt: skip
    if "content-length" in headers and "transfer-encoding" in headers:
        # A proxy may read another length than this server, and take the rest for a request.
        return RefusedError(
            400, "found Content-Length and Transfer-Encoding, expected one of them",
            headers={"Connection": "close"},
        )  # fmt: skip
    return None


class _BodyError(BaseException):
    """Not caught by handlers of ordinary exceptions in the app."""

    def __init__(self, refusal: RefusedError) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal
