"""What stands before every request: the key, and a body that is counted while it arrives."""

from __future__ import annotations

import hmac
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smolstack.serve.failures import RefusedError
from smolstack.serve.settings import ServerSettings

OPEN = ("/", "/page.js", "/page.css", "/health")  # answered without a key


class Guard:
    """ASGI middleware that refuses requests without the key and bodies that are too large.

    Args:
        count: told the route and the status of every response.
    """

    def __init__(
        self, app: ASGIApp, settings: ServerSettings, count: Callable[[str, int], None]
    ) -> None:
        self.app, self.settings, self.count = app, settings, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, limit = Headers(scope=scope), self.settings.body_bytes
        received = 0
        answered = False

        async def sending(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                path = getattr(scope.get("route"), "path", "other")
                self.count(path, message["status"])
            await send(message)

        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            await refusal.response()(scope, receive, sending)
            return

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > limit:
                    raise _TooLargeError
            return message

        try:
            await self.app(scope, counted, sending)
        except _TooLargeError:
            if not answered:
                await self._too_large().response()(scope, receive, sending)

    def _refusal(self, path: str, headers: Headers) -> RefusedError | None:
        key = self.settings.api_key
        if key is not None and path not in OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            good = scheme.lower() == "bearer" and hmac.compare_digest(
                given.strip().encode(), key.encode()
            )
            if not good:
                return RefusedError(
                    401,
                    "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self.settings.body_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> RefusedError:
        return RefusedError(
            413,
            f"the body is larger than the {self.settings.body_bytes:,} bytes that are accepted",
            headers={"Connection": "close"},
        )


class _TooLargeError(BaseException):
    """Passes every handler of ordinary errors on its way out of the app."""
