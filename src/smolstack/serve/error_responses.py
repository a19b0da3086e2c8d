"""Error responses in OpenAI's format: a status and {"error": {message, type, param, code}}."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from smolstack.errors import DeadlineError, ImageError, QueueFullError, SmolstackError

_log = logging.getLogger("smolstack.serve")
_LONGEST, _LONGEST_PARAM = 1000, 200  # characters
_TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}
_CODES = {
    401: "invalid_api_key",
    408: "request_too_slow",
    413: "request_too_large",
    431: "headers_too_large",
    429: "queue_full",
    504: "deadline",
}


class RefusedError(Exception):
    """A request is refused, with this HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # Messages quote values from the request, which may be long.
        message = message if len(message) <= _LONGEST else f"{message[:_LONGEST]}…"
        super().__init__(message)
        self.status, self.message = status, message
        self.param = None if param is None else param[:_LONGEST_PARAM]
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": _CODES.get(self.status),
            }
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers=self.headers)


def as_refusal(error: Exception, retry_after: int = 1) -> RefusedError:
    """Convert an error to a refusal, and clear the error's traceback.

    The tasks and frames in a traceback form reference cycles that contain the request's body and
    images, which would stay in memory until the next garbage collection.
    """
    refusal = _refusal(error, retry_after)
    each: BaseException | None = error
    while each is not None:
        each.__traceback__, each = None, each.__cause__ or each.__context__
    return refusal


def _refusal(error: Exception, retry_after: int) -> RefusedError:
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, QueueFullError):
        return RefusedError(429, str(error), headers={"Retry-After": str(retry_after)})
    if isinstance(error, DeadlineError):
        return RefusedError(504, str(error))
    if isinstance(error, ImageError):
        return RefusedError(400, str(error), param=error.name)
    if isinstance(error, SmolstackError):
        return RefusedError(400, str(error))
    _log.error("a request failed", exc_info=error)
    return RefusedError(500, "internal server error; see the server's log")


def add_handlers(app: FastAPI) -> None:
    """Return all errors of an app in OpenAI's format."""

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> JSONResponse:
        return error.response()

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return as_refusal(error).response()
