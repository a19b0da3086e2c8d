"""Running the server: listening, signals, shutdown."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
import sys
import time
from pathlib import Path

import uvicorn

from smolstack.serve.allocator import return_memory
from smolstack.serve.connections import Connection, ConnectionLimiter, connection_limit
from smolstack.serve.error_responses import RefusedError
from smolstack.serve.server import Server
from smolstack.serve.settings import ServerSettings
from smolstack.vlm import VLM

_SWITCH = 0.0005  # seconds; a tenth of Python's default
_LOG_SECONDS = 60.0  # in which a message of uvicorn is logged once
_BACKSTOP = 5  # seconds after draining, for clients that do not read their response


def run(
    vlm: VLM,
    settings: ServerSettings,
    listener: socket.socket,
    *,
    log_level: str,
    certificate: tuple[Path, Path | None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then finish running requests for ``settings.drain`` seconds.

    Args:
        certificate: PEM files of a TLS certificate and its key; None: plain HTTP.
    """
    files = {} if certificate is None else {
        "ssl_certfile": certificate[0],
        "ssl_keyfile": certificate[1],
    }  # fmt: skip
    limit = connection_limit(settings.connections)
    return_memory()
    # A thread that requests the interpreter lock while another one runs waits this long, and the
    # engine's thread requests it many times per token.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH)
    server = Server(vlm, settings)
    config = uvicorn.Config(
        server.app,
        log_level=log_level,
        access_log=log_level == "info",
        timeout_graceful_shutdown=math.ceil(settings.drain) + _BACKSTOP,
        # h11 limits the size of headers; httptools, which uvicorn would prefer if it is
        # installed, does not.
        http="h11",
        h11_max_incomplete_event_size=64 * 1024,
        ws="none",
        server_header=False,
        **files,  # type: ignore[arg-type]
    )
    runner = _Runner(
        config, server, ConnectionLimiter(limit, settings.header_seconds, settings.body_seconds)
    )

    log = logging.getLogger("uvicorn.error")
    if not any(isinstance(each, OnceInAWhile) for each in log.filters):
        log.addFilter(OnceInAWhile())

    def end(*_: object) -> None:
        runner.should_exit = True

    # uvicorn raises the signal again after shutdown; a requested shutdown must exit with 0.
    signal.signal(signal.SIGTERM, end)
    try:
        runner.run(sockets=[listener])
    finally:
        server.close()
        sys.setswitchinterval(interval)


class OnceInAWhile(logging.Filter):
    """Drops warnings that were logged a short while ago: any client can cause those about requests
    that are not valid HTTP, and would fill the disk with them.

    Args:
        seconds: for which a message is not repeated.
    """

    def __init__(self, seconds: float = _LOG_SECONDS) -> None:
        super().__init__()
        self.seconds = seconds
        self._logged: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is logged; errors and messages below a warning always are."""
        if record.levelno != logging.WARNING:
            return True
        now, text = time.monotonic(), str(record.msg)
        if now - self._logged.get(text, -self.seconds) < self.seconds:
            return False
        self._logged[text] = now  # the message without its values: there are few
        return True


class _Runner(uvicorn.Server):
    """uvicorn's server with limited connections, and with errors for requests that are incomplete
    after draining."""

    def __init__(self, config: uvicorn.Config, server: Server, limiter: ConnectionLimiter) -> None:
        super().__init__(config)
        self.server, self.limiter = server, limiter

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])

        def make() -> Connection:
            return Connection(
                config=self.config,
                server_state=self.server_state,
                app_state=self.lifespan.state,
                limiter=self.limiter,
            )

        self.limiter.start(sockets or [], make, self.config.ssl)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self.limiter.close()
        timer = asyncio.get_running_loop().call_later(self.server.settings.drain, self._drained)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def _drained(self) -> None:
        late = RefusedError(503, "the server is shutting down before the answer is complete")
        self.server.engine.abort(late)
        self.server.bodies.end(
            RefusedError(
                503,
                "the server is shutting down before the body is complete",
                headers={"Connection": "close"},
            )
        )
